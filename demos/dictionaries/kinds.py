"""Commands that measure several kinds of dictionaries, a line of a table for each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from demos.dictionaries.tune import coders_in
from saes.training import load_model


def parser(prog: str, what: str) -> argparse.ArgumentParser:
    """The options that they share; `what` says what is given with --of."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    parser.add_argument("--of", nargs="+", action="append", required=True, metavar=("KIND", "FOLDER"), help=what)
    parser.add_argument("--model", help="name or folder of the model (default: the coders')")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def write_lines(
    args: argparse.Namespace, line: Callable[..., Any], table: Callable[[dict[str, list[Any]]], str], more: int = 0
) -> None:
    """Measure what --of names and print it, line by line and as one table.

    Parameters
    ----------
    args
        Of :func:`parser`.
    line
        Called with the model, the kind, its coders and the words between folder and match: one line, a named tuple.
    table
        Model -> its lines, as Markdown.
    more
        How many words there are between.

    Raises
    ------
    SystemExit
        --of was given too few words or too many.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    lines: dict[str, list[Any]] = {}
    for one in args.of:
        if not 2 + more <= len(one) <= 3 + more:
            raise SystemExit(f"error: --of takes from {2 + more} to {3 + more} words, got {' '.join(one)}")
        kind, folder, *rest = one
        coders = coders_in(Path(folder), *rest[more:])
        name = args.model or next(iter(coders.values())).cfg.model_name or ""
        lines.setdefault(name, []).append(line(load_model(name), kind, coders, *rest[:more]))
        print(table({name: lines[name][-1:]}).splitlines()[-1], flush=True)
    print("\n" + table(lines))
    if args.json:
        found = {name: [one._asdict() for one in some] for name, some in lines.items()}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
