"""What a training run may be told, validated, and the command line made from it."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILIES = ("mamba", "mamba2")


def _option(default: Any = dataclasses.MISSING, help: str = "", low: float | None = None, high: float | None = None):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run. Two runs with equal options give equal weights, bit for bit, on one machine."""

    text: Path = _option(help="training text: stories parted by lines <|endoftext|>")
    valid: Path = _option(help="held-out text, the same format")
    out: Path = _option(help="folder for checkpoints, log and the finished model")
    family: str = _option(help="mamba or mamba2")
    name: str = _option("tinystories", "name of the model, for its card")
    tokenizer: Path | None = _option(None, "folder of a trained tokenizer; default: train one on the mix")
    d_vocab: int = _option(3072, "entries of a tokenizer trained here", 257)
    generated_share: float = _option(0.0, "share of training rows that come from the grammar", 0, 1)
    generated_stories: int = _option(6000, "stories of the grammar to draw those rows from", 1)
    d_model: int = _option(192, "width of the residual stream", 1)
    n_layers: int = _option(4, "blocks", 1)
    d_state: int | None = _option(None, "state size; default: 16 for mamba, 64 for mamba2", 1)
    head_dim: int = _option(64, "channels of a head (mamba2)", 1)
    steps: int = _option(1400, "optimiser steps", 1)
    batch: int = _option(16, "rows a step", 1)
    length: int = _option(256, "tokens a row", 2)
    lr: float = _option(3e-3, "highest learning rate", 0)
    warmup: int = _option(60, "steps of linear warm-up", 0)
    final_lr: float = _option(0.02, "last learning rate as a share of the highest (cosine in between)", 0, 1)
    weight_decay: float = _option(0.1, "AdamW's decay, on matrices only", 0)
    beta2: float = _option(0.98, "AdamW's second beta; the first is 0.9", 0, 1)
    clip: float = _option(1.0, "largest gradient norm", 0)
    dropout: float = _option(0.1, "dropout on the embedding and on every mixer's output", 0, 0.95)
    eval_every: int = _option(100, "steps between held-out measurements", 1)
    checkpoint_every: int = _option(100, "steps between checkpoints", 1)
    seed: int = _option(0, "seed of weights, crops, dropout and stories", 0)
    threads: int = _option(0, "CPU threads; 0 leaves the choice to torch", 0)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {FAMILIES}, got {self.family!r}")
        for entry in dataclasses.fields(self):
            value, low, high = getattr(self, entry.name), entry.metadata.get("low"), entry.metadata.get("high")
            if value is None or low is None:
                continue
            if not value >= low or (high is not None and not value <= high):
                bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise ValueError(f"{entry.name} must be {bounds}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers: every option that the result depends on."""
        values = dataclasses.asdict(self)
        for machine in ("text", "valid", "out", "tokenizer", "threads", "checkpoint_every"):
            del values[machine]
        return values

    def check_same_run(self, stored: dict[str, Any]) -> None:
        """Raise where a checkpoint was made with other options than these."""
        mine = self.to_dict()
        for name in sorted(mine.keys() | stored.keys()):
            if mine.get(name) != stored.get(name):
                raise ValueError(
                    f"cannot resume: the checkpoint has {name}={stored.get(name)!r}, this run {mine.get(name)!r}"
                )


def parse_args(argv: list[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether to resume. Unknown options are errors."""
    parser = argparse.ArgumentParser(
        prog="python -m demos.tinystories.train", description="Train a small hooked language model.", allow_abbrev=False
    )
    types = {"int": int, "float": float, "str": str, "Path": Path, "Path | None": Path, "int | None": int}
    for entry in dataclasses.fields(Options):
        required = entry.default is dataclasses.MISSING
        text = entry.metadata["help"] + ("" if required or entry.default is None else " (default: %(default)s)")
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=types[str(entry.type)],
            required=required,
            default=None if required else entry.default,
            choices=FAMILIES if entry.name == "family" else None,
            help=text,
        )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, bit for bit")
    values = vars(parser.parse_args(argv))
    resume = values.pop("resume")
    try:
        return Options(**values), resume
    except ValueError as error:
        parser.error(str(error))
