"""Compare the recurrences: python -m demos.recurrences"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from demos.localisation.study import MODELS
from demos.recurrences.report import report_of
from demos.recurrences.subjects import subjects
from demos.studies.report import show, write
from demos.tour.terminal import make_console


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write one page."""
    parser = argparse.ArgumentParser(
        prog="python -m demos.recurrences",
        description="Which recurrence keeps what, and how long?",
        allow_abbrev=False,
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the trained models (%(default)s)")
    parser.add_argument("--prompts", type=int, default=256, help="prompts of a kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/studies/recurrences.html"), help="page (%(default)s)")
    args = parser.parse_args(argv)
    if args.prompts < 2:
        parser.error(f"--prompts must be 2 or more, got {args.prompts}")
    try:
        with torch.no_grad():
            report = report_of(subjects(args.models), args.prompts, args.seed)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(report, args.out)
    show(report, args.out.resolve(), make_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
