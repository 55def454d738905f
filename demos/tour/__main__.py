"""Look inside one prediction of a model: python -m demos.tour --prompt "Once upon a time, a little cat was"."""

from __future__ import annotations

import argparse
from pathlib import Path

from demos.tour.measure import load, take_tour
from demos.tour.page import write_page
from demos.tour.terminal import make_console, show

MODEL = "tinystories-4l"
PROMPT = "I like to eat toast for breakfast. I'm so"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demos.tour", description="Read and edit the inside of one prediction.", allow_abbrev=False
    )
    parser.add_argument("--model", default=MODEL, help="bundled name, folder or hub id (default: %(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="text to read (default: %(default)r)")
    parser.add_argument("--out", type=Path, default=Path("out/tour.html"), help="page to write (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write the page."""
    args = parse_args(argv)
    tour = take_tour(load(args.model), args.prompt)
    write_page(tour, args.out)
    show(tour, args.out.resolve(), make_console())


if __name__ == "__main__":
    main()
