"""Commands that make files of new texts to train dictionaries on: what they share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from demos.tinystories.text import write_stories


def parser(name: str, stories: int, text: bool = True) -> argparse.ArgumentParser:
    """The options that they share.

    Parameters
    ----------
    name
        Of the module here.
    stories
        How many texts are made by default.
    text
        Whether they are made of a file of stories.
    """
    parser = argparse.ArgumentParser(prog=f"python -m demos.dictionaries.{name}", allow_abbrev=False)
    add = parser.add_argument
    if text:
        add("--text", type=Path, required=True, help="stories to make them of, parted by lines <|endoftext|>")
    add("--stories", type=count, default=stories, help="how many to make (default: %(default)s)")
    add("--out", type=Path, required=True, help="text file to write")
    add("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    return parser


def count(text: str) -> int:
    """A number from a command line.

    Raises
    ------
    ArgumentTypeError
        It is no whole number of 1 or more.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def write(
    parser: argparse.ArgumentParser, argv: list[str] | None, make: Callable[[argparse.Namespace], Iterable[str]]
) -> int:
    """Read a command line and write the texts that `make` gives for it; the exit code, after a line that says why."""
    args = parser.parse_args(argv)
    source: Path | None = getattr(args, "text", None)
    if source is not None and args.out.resolve() == source.resolve():
        parser.error(f"--out is --text, {source}: it would be overwritten; name another file")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_stories(args.out, make(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
