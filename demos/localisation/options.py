"""What a training run may be told, and the command line made from it."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from demos.localisation.families import TITLES
from demos.localisation.task import NAMES, SIZES, Task


def about(help: str, low: float | None = None) -> dict[str, Any]:
    """What an option means, and the least that it may be."""
    return {"help": help, "low": low}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run. Two runs with equal options give equal weights, bit for bit, on one machine."""

    program: ClassVar[str] = "demos.localisation.train"

    task: str = field(metadata=about("recall or induction"))
    out: Path = field(metadata=about("folder for checkpoint, log and the finished model"))
    family: str = field(default="mamba", metadata=about(f"one of {', '.join(TITLES)}"))
    size: int | None = field(
        default=None, metadata=about("recall: pairs of a prompt (default: 8); induction: its length (default: 16)", 2)
    )
    vocab: int = field(default=32, metadata=about("tokens; in recall half of them are keys, half values", 4))
    d_model: int = field(default=64, metadata=about("width of the residual stream", 1))
    n_layers: int = field(default=2, metadata=about("blocks", 1))
    d_state: int = field(default=16, metadata=about("state size", 1))
    steps: int = field(default=2000, metadata=about("optimiser steps", 1))
    batch: int = field(default=256, metadata=about("sequences a step", 1))
    questions: int = field(default=8, metadata=about("questions a sequence", 1))
    grow: int = field(default=900, metadata=about("steps after which prompts have their full size", 1))
    lr: float = field(default=4e-3, metadata=about("highest learning rate", 0))
    warmup: int = field(default=100, metadata=about("steps of linear warm-up", 0))
    final_lr: float = field(default=0.02, metadata=about("last learning rate as a share of the highest (cosine)", 0))
    weight_decay: float = field(default=0.01, metadata=about("AdamW's decay, on matrices only", 0))
    beta2: float = field(default=0.98, metadata=about("AdamW's second beta; the first is 0.9", 0))
    clip: float = field(default=1.0, metadata=about("largest gradient norm", 0))
    held_out: int = field(default=1000, metadata=about("held-out prompts of a measurement", 1))
    eval_every: int = field(default=100, metadata=about("steps between measurements", 1))
    checkpoint_every: int = field(default=200, metadata=about("steps between checkpoints", 1))
    seed: int = field(default=0, metadata=about("seed of weights and sequences", 0))
    threads: int = field(default=0, metadata=about("CPU threads; 0 leaves the choice to torch", 0))

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, low = getattr(self, entry.name), entry.metadata["low"]
            if low is not None and value is not None and not value >= low:
                raise ValueError(f"{entry.name} must be at least {low}, got {value!r}")
        if self.family not in TITLES:
            raise ValueError(f"family must be one of {', '.join(TITLES)}, got {self.family!r}")
        self.goal  # noqa: B018  a task that does not exist is an error now, not after a model was built

    @property
    def goal(self) -> Task:
        """The task at its full size."""
        return Task(self.task, self.size or SIZES.get(self.task, 0), self.vocab)

    @property
    def name(self) -> str:
        """The model's name: its task, and its family where that is not Mamba-1."""
        return self.task if self.family == "mamba" else f"{self.task}-{self.family.replace('_', '-')}"

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers: every option that the result depends on."""
        values = dataclasses.asdict(self)
        for machine in ("out", "threads", "checkpoint_every"):
            del values[machine]
        return values

    def command(self) -> str:
        """The command line of this run, options at their defaults left out."""
        words = [f"python -m {self.program}"]
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value != entry.default and entry.name not in ("out", "threads", "checkpoint_every"):
                words.append(f"--{entry.name.replace('_', '-')} {value}")
        return " ".join([*words, f"--out runs/{self.out.name}"])


OptionsType = TypeVar("OptionsType", bound=Options)


def parse_args(
    argv: list[str] | None = None,
    options: type[OptionsType] = Options,  # type: ignore[assignment]
    about: str = "Train a small model on a task whose answers are at known positions.",
) -> tuple[OptionsType, bool]:
    """The options of a command line, and whether to resume. Unknown options are errors."""
    parser = argparse.ArgumentParser(prog=f"python -m {options.program}", description=about, allow_abbrev=False)
    types = {"int": int, "float": float, "str": str, "Path": Path, "int | None": int}
    for entry in dataclasses.fields(options):
        required = entry.default is dataclasses.MISSING
        text = entry.metadata["help"] + ("" if required or entry.default is None else " (default: %(default)s)")
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=types[str(entry.type)],
            required=required,
            default=None if required else entry.default,
            choices={"task": NAMES, "family": tuple(TITLES)}.get(entry.name),
            help=text,
        )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, bit for bit")
    values = vars(parser.parse_args(argv))
    resume = values.pop("resume")
    try:
        return options(**values), resume
    except ValueError as error:
        parser.error(str(error))
