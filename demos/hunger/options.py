"""How much is measured, and with which seeds; the command line is made from it."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = ("tinystories-4l", "tinystories-4l-real")
"""The model that was also told made-up stories, and the one of real text alone."""


def _about(help: str, quick: int | None = None) -> dict[str, Any]:
    return {"help": help, "quick": quick}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One run. Equal options give equal numbers on one machine."""

    words: int = field(default=8, metadata=_about("words of each half that are put into every frame, at most", 2))
    told: int = field(
        default=8000, metadata=_about("stories of the grammar that planted sentences are counted in", 200)
    )
    stories: int = field(default=192, metadata=_about("stories that the model writes to see how active latents are", 8))
    story_tokens: int = field(default=96, metadata=_about("tokens of each", 32))
    shortlist: int = field(default=10, metadata=_about("latents that tell the sentences apart best and are tried", 4))
    controls: int = field(default=40, metadata=_about("random latents of like length and frequency", 5))
    generations: int = field(default=50, metadata=_about("stories of an arm of steering", 10))
    new_tokens: int = field(default=24, metadata=_about("tokens of each", 8))
    heads: int = field(default=200, metadata=_about("random heads that are cut beside the named one", 5))
    resamples: int = field(default=2000, metadata=_about("of a bootstrap interval", 100))
    nearest: int = field(default=150, metadata=_about("tokens near the decoder row that are drawn", 30))
    seed: int = field(default=0, metadata=_about("of everything that is drawn"))

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, low = getattr(self, entry.name), 0 if entry.name == "seed" else 2
            if value < low:
                raise ValueError(f"{entry.name} must be {low} or more, got {value}")

    @classmethod
    def quick(cls, **given: int) -> Options:
        """Little of everything: shows that it runs, and nothing else."""
        few = {entry.name: entry.metadata["quick"] for entry in dataclasses.fields(cls) if entry.metadata["quick"]}
        return cls(**{**few, **given})

    def to_dict(self) -> dict[str, int]:
        """All of them: every result depends on them."""
        return dataclasses.asdict(self)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: `options`, `models` and `out`. Unknown arguments are errors."""
    parser = argparse.ArgumentParser(
        prog="python -m demos.hunger",
        description="Test the story of a hunger feature claim by claim; a run that was stopped continues where it was.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        help="bundled names (default: %(default)s); NAME/write and NAME/output judge dictionaries of another kind,"
        " NAME/KIND=FOLDER those of a folder",
    )
    parser.add_argument("--out", type=Path, default=Path("out/hunger"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--cut", action="store_true", help="also judge the claims about cutting the planted cue")
    parser.add_argument("--document", type=Path, help="also write the results as Markdown to this file")
    for entry in dataclasses.fields(Options):
        text = f"{entry.metadata['help']} (default: {entry.default})"
        parser.add_argument(f"--{entry.name.replace('_', '-')}", type=int, help=text)
    args = parser.parse_args(argv)
    given = {e.name: getattr(args, e.name) for e in dataclasses.fields(Options) if getattr(args, e.name) is not None}
    try:
        args.options = Options.quick(**given) if args.quick else Options(**given)
    except ValueError as error:
        parser.error(str(error))
    return args
