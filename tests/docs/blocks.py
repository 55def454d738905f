"""Python blocks of markdown files: found, run, and their printed output held against what the file shows.

A ```python block that is followed by a ```text block promises to print that text. All blocks of a file are one program.

The last digit of a rounded figure may differ by one unit, since processors add in different orders
(`demos.notebooks.rounded.alike`). Figures that are nothing but rounding (a residual of 1e-6) are printed as bounds.
"""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from hooked_mamba.hooks import names
from hooked_mamba.hooks.sited import DECLARED
from hooked_mamba.mixers.base import KINDS
from hooked_mamba.model.hooked_model import MODELS
from hooked_mamba.models import HookedHybrid as HookedHybrid  # every kind is defined before a page is

ROOT = Path(__file__).parents[2]
SEPARATOR = "\x1e"


def documents() -> list[Path]:
    """The files whose blocks are run."""
    found = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("hooked_mamba/pretrained/*/README.md")]
    return sorted(path for path in found if blocks_of(path))


@dataclass(frozen=True)
class Block:
    """One python block; line numbers count from 0."""

    start: int
    """Its first line, behind the fence."""
    end: int
    """The line of its closing fence."""
    shown: tuple[int, int] | None
    """First line and closing fence of the text block behind it, where there is one."""


def blocks_of(path: Path) -> list[Block]:
    """The python blocks of a file.

    Raises
    ------
    ValueError
        A block that is never closed.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    fenced: list[tuple[str, int, int]] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines):
        if opened is None and line.startswith("```"):
            opened = line[3:].strip(), number + 1
        elif opened is not None and line.rstrip() == "```":
            fenced.append((*opened, number))
            opened = None
    if opened is not None:
        raise ValueError(f"{path.name}:{opened[1]}: a block that is never closed")
    blocks = []
    for (language, start, end), (next_language, next_start, next_end) in pairwise([*fenced, ("", -1, -1)]):
        beside = next_language == "text" and not any(lines[end + 1 : next_start - 1])
        if language == "python":
            blocks.append(Block(start, end, (next_start, next_end) if beside else None))
    return blocks


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Kinds of branches and models that are defined inside are not known to the package afterwards."""
    kinds, models, count = dict(KINDS), dict(MODELS), len(DECLARED)
    try:
        yield
    finally:
        for registry, before in ((KINDS, kinds), (MODELS, models)):
            registry.clear()
            registry.update(before)
        del DECLARED[count:]
        names._declared.cache_clear()


def run_blocks(path: Path, folder: Path) -> list[str]:
    """Run a file's blocks as one program, whose lines keep their numbers; what each of them printed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    program = [""] * len(lines)
    for block in blocks_of(path):
        program[block.start - 1] = f"print({SEPARATOR!r}, end='')"
        program[block.start : block.end] = lines[block.start : block.end]
    script = folder / f"{path.stem}.py"
    script.write_text("\n".join(program) + "\n", encoding="utf-8")
    printed = io.StringIO()
    # Each page as if alone: in a folder of its own, and with gradients on, which an earlier page may have switched off.
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), torch.set_grad_enabled(True), forgotten():
        runpy.run_path(str(script))
    return printed.getvalue().split(SEPARATOR)[1:]
