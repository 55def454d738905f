"""The tables of hook sites in the docs, printed from what the modules declare."""

from __future__ import annotations

from collections.abc import Iterable

import hooked_mamba.models  # noqa: F401  # every kind of branch is defined
from hooked_mamba.hooks.site import Site
from hooked_mamba.hooks.sited import rows_of
from hooked_mamba.mixers.base import KINDS
from hooked_mamba.model.shared_block import SharedBlock
from hooked_mamba.model.stack import Block, Stack

MIXERS = "hooked_mamba.mixers."
"""Where the package's own branches are defined."""

HEAD = "| site | shape | what it is |\n|---|---|---|"


def stream_table() -> str:
    """The sites outside of branches: embedding, residual stream, norms, logits."""
    top = list(rows_of(Stack))
    block = [(f"blocks.{{i}}.{name}", row) for name, row in rows_of(Block)]
    first = next(i for i, (name, _) in enumerate(top) if name.startswith("ln_final."))
    return _table([*top[:first], *block, *top[first:]])


def shared_table() -> str:
    """The sites that a block with a shared transformer has outside of its branches."""
    return _table((f"blocks.{{i}}.{name}", row) for name, row in rows_of(SharedBlock))


def branch_table(kind: str) -> str:
    """The sites of one kind of branch, such as "mamba"."""
    cls = KINDS[kind]
    return _table((f"blocks.{{i}}.{cls.place}.{name}", row) for name, row in rows_of(cls))


def all_tables() -> dict[str, str]:
    """Title -> table: the stream first, then every kind of branch that the package has, by title."""
    ours = {cls.title: kind for kind, cls in KINDS.items() if cls.title and cls.__module__.startswith(MIXERS)}
    first = {"Stream": stream_table(), "Blocks with a shared transformer": shared_table()}
    return first | {title: branch_table(ours[title]) for title in sorted(ours)}


def _table(rows: Iterable[tuple[str, Site]]) -> str:
    lines = [HEAD]
    for name, row in rows:
        lazy = "" if row.kind == "point" or row.default else " *(only while something sits on it)*"
        lines.append(f"| `{name}` | {row.shape} | {row.text}{lazy} |")
        if row.kind == "state":
            shape = row.shape.replace("b l ", "b ")
            lines.append(f"| `{name}.{{t}}` | {shape} | {row.single}{lazy} |")
    return "\n".join(lines)
