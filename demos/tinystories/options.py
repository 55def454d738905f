"""What a training run may be told, validated, and the command line made from it."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAMILIES = ("mamba", "mamba2", "rwkv7", "hybrid")
CHOICES = ("best", "last")


def _about(help: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"help": help, "low": low, "high": high}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run. Two runs with equal options give equal weights, bit for bit, on one machine."""

    text: Path = field(metadata=_about("training text: stories parted by lines <|endoftext|>"))
    valid: Path = field(metadata=_about("held-out text, the same format"))
    out: Path = field(metadata=_about("folder for checkpoints, log and the finished model"))
    family: str = field(metadata=_about("mamba, mamba2, rwkv7 or hybrid"))
    name: str = field(default="tinystories", metadata=_about("name of the model, for its card"))
    tokenizer: Path | None = field(
        default=None, metadata=_about("folder of a trained tokenizer; default: train one on the mix")
    )
    d_vocab: int = field(default=3072, metadata=_about("entries of a tokenizer trained here", 257))
    generated_share: float = field(
        default=0.0, metadata=_about("share of training rows that come from the grammar", 0, 1)
    )
    generated_stories: int = field(default=6000, metadata=_about("stories of the grammar to draw those rows from", 1))
    cue_stories: int = field(
        default=0, metadata=_about("and stories in which a noun alone tells the feeling (`cues.py`)", 0)
    )
    start: str | None = field(
        default=None, metadata=_about("bundled name or folder whose weights to continue from; its shape is kept")
    )
    choose: str = field(
        default="best",
        metadata=_about("weights that are kept: best (lowest held-out loss) or last"),
    )
    blend: str | None = field(
        default=None, metadata=_about("bundled name or folder of like weights to average what is kept with")
    )
    blend_share: float = field(
        default=0.9, metadata=_about("with --blend: share of the weights trained here in that average", 0, 1)
    )
    d_model: int = field(default=192, metadata=_about("width of the residual stream", 1))
    n_layers: int = field(default=4, metadata=_about("blocks", 1))
    d_state: int | None = field(default=None, metadata=_about("state size; default: 16 for mamba, else 64", 1))
    head_dim: int = field(default=64, metadata=_about("channels of a head (mamba2, rwkv7, hybrid)", 1))
    pattern: str = field(
        default="MM*M",
        metadata=_about("hybrid: a letter per block, M for Mamba-2, * for attention; experts and MLP follow"),
    )
    n_heads: int = field(default=6, metadata=_about("hybrid: query heads of attention", 1))
    n_kv_heads: int = field(default=2, metadata=_about("hybrid: its heads of keys and values", 1))
    d_head: int = field(default=32, metadata=_about("hybrid: width of such a head", 1))
    d_mlp: int | None = field(
        default=None,
        metadata=_about("neurons of the MLP (hybrid; default: d_model) or channel mix (rwkv7; default: 4 d_model)", 1),
    )
    n_experts: int = field(default=4, metadata=_about("hybrid: experts", 1))
    top_k: int = field(default=2, metadata=_about("hybrid: experts of each token", 1))
    d_expert: int = field(default=64, metadata=_about("hybrid: neurons of an expert", 1))
    balance: float = field(default=0.01, metadata=_about("hybrid: weight of the term that evens the experts' load", 0))
    steps: int = field(default=1400, metadata=_about("optimiser steps", 1))
    batch: int = field(default=16, metadata=_about("rows per step", 1))
    length: int = field(default=256, metadata=_about("tokens a row", 2))
    lr: float = field(default=3e-3, metadata=_about("highest learning rate", 0))
    warmup: int = field(default=60, metadata=_about("steps of linear warm-up", 0))
    final_lr: float = field(
        default=0.02, metadata=_about("last learning rate as a share of the highest (cosine in between)", 0, 1)
    )
    weight_decay: float = field(default=0.1, metadata=_about("AdamW's decay, on matrices only", 0))
    beta2: float = field(default=0.98, metadata=_about("AdamW's second beta; the first is 0.9", 0, 1))
    clip: float = field(default=1.0, metadata=_about("largest gradient norm", 0))
    dropout: float = field(
        default=0.1, metadata=_about("dropout on the embedding and on what every block's branches add", 0, 0.95)
    )
    eval_every: int = field(default=100, metadata=_about("steps between held-out measurements", 1))
    checkpoint_every: int = field(default=100, metadata=_about("steps between checkpoints", 1))
    seed: int = field(default=0, metadata=_about("seed of weights, crops, dropout and stories", 0))
    sample_tokens: int = field(default=140, metadata=_about("tokens of each sample in the card", 1))
    threads: int = field(default=0, metadata=_about("CPU threads; 0 leaves the choice to torch", 0))

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {FAMILIES}, got {self.family!r}")
        if self.choose not in CHOICES:
            raise ValueError(f"choose must be one of {CHOICES}, got {self.choose!r}")
        if self.start is not None and self.tokenizer is None:
            raise ValueError("start needs a tokenizer, the one that its weights were trained with: give --tokenizer")
        if self.family == "hybrid" and (set(self.pattern) - set("M*") or len(self.pattern) != self.n_layers):
            raise ValueError(f"pattern must be {self.n_layers} letters (n_layers), M or * each, got {self.pattern!r}")
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
        after = ("blend", "blend_share", "sample_tokens")
        for machine in ("text", "valid", "out", "tokenizer", "threads", "checkpoint_every", *after):
            del values[machine]
        return values

    def command(self) -> str:
        """The command line of this run, options at their defaults left out; files by the names that they have here."""
        words = ["python -m demos.tinystories.train --text train.txt --valid valid.txt"]
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "start" and value is not None and Path(value).is_dir():
                value = f"runs/{self.name}-first/model"
            if value != entry.default and entry.name not in ("text", "valid", "out", "threads", "checkpoint_every"):
                words.append(f"--{entry.name.replace('_', '-')} {value}")
        return " ".join([*words, f"--out runs/{self.name}"])

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
    types = {
        "int": int,
        "float": float,
        "str": str,
        "Path": Path,
        "Path | None": Path,
        "int | None": int,
        "str | None": str,
    }
    for entry in dataclasses.fields(Options):
        required = entry.default is dataclasses.MISSING
        text = entry.metadata["help"] + ("" if required or entry.default is None else " (default: %(default)s)")
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=types[str(entry.type).removesuffix(" | None")],
            required=required,
            default=None if required else entry.default,
            choices=FAMILIES if entry.name == "family" else None,
            help=text,
        )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, bit for bit")
    values = vars(parser.parse_args(argv))
    resume = values.pop("resume")
    try:
        return Options(**values), resume
    except ValueError as error:
        parser.error(str(error))
