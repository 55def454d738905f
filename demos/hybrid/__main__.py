"""What attention adds to a state: python -m demos.hybrid"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from demos.hybrid.study import study
from demos.studies.report import render, show
from demos.tinystories.checkpoint import write_atomically
from demos.tour.terminal import make_console

TEMPLATE = Path(__file__).with_name("hybrid.html")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, print what it found, write its page."""
    parser = argparse.ArgumentParser(prog="python -m demos.hybrid", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out/hybrid"), help="folder for the page (%(default)s)")
    parser.add_argument("--prompts", type=int, default=400, help="prompts of each size (%(default)s)")
    parser.add_argument("--stories", type=int, default=32, help="stories; 0 leaves them out (%(default)s)")
    args = parser.parse_args(argv)
    if args.prompts < 32 or args.stories < 0:
        parser.error(f"--prompts must be 32 or more and --stories 0 or more, got {args.prompts} and {args.stories}")
    page = args.out / "index.html"
    report = study(args.prompts, args.stories)
    write_atomically(page, render(report, TEMPLATE).encode())
    show(report, page.resolve(), make_console())


if __name__ == "__main__":
    main()
