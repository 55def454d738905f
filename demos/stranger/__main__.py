"""What typeseg's classifier knows, and where: python -m demos.stranger (needs the extra `stranger`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from demos.stranger.directions import directions_section
from demos.stranger.learned import coder_section, probe_section
from demos.stranger.model import HookedStranger, load
from demos.stranger.patches import patching_section
from demos.stranger.task import same_section, task_section
from demos.stranger.text import documents
from demos.studies.report import Report, render, show
from demos.tinystories.checkpoint import write_atomically
from demos.tour.terminal import make_console

TEMPLATE = Path(__file__).with_name("stranger.html")


@dataclass(frozen=True)
class Options:
    """How much the study does."""

    train: int = 96
    """Documents that probe and coder are fitted on."""
    test: int = 32
    """Documents that everything is judged on."""
    length: int = 256
    """Characters of a document."""
    lines: int = 4
    """Ambiguous lines that are patched."""
    layer: int = 4
    """Whose entering stream the autoencoder is trained on."""
    steps: int = 200
    """Its training."""


def study(model: HookedStranger, labels: list[str], options: Options) -> Report:
    """The whole study."""
    report = Report(
        "stranger",
        "A stranger's model: what it knows, and where",
        "A Mamba of six layers that reads bytes in both directions and says of every character which of 35 kinds of"
        " content it belongs to. Nobody here trained it. Its mixer and its loader are one file of less than 150 lines;"
        " hooks, caches, patching, hidden attention and dictionaries work on it as on any other model.",
        "The model “precise” of the PyPI package typeseg 0.2.7 (Apache-2.0). All text was made for this page.",
        f"{model.cfg.model_name}: {model.cfg.n_layers} layers, d = {model.cfg.d_model}, E = {model.cfg.E},"
        f" N = {model.cfg.d_state}.",
    )
    test = documents(options.test, options.length, seed=1)
    some = documents(options.train, options.length, seed=2)
    report.sections += [
        same_section(model, test[:4]),
        task_section(model, labels, test),
        patching_section(model, labels, options.lines),
        directions_section(model, labels, test[: max(4, len(test) // 4)]),
        probe_section(model, some[: len(some) // 2], test),
        coder_section(model, labels, options.layer, some, test, options.steps),
    ]
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, print what it found, write its page."""
    parser = argparse.ArgumentParser(prog="python -m demos.stranger", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out/stranger"), help="folder for the page (%(default)s)")
    for name, default in vars(Options()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    args = vars(parser.parse_args(argv))
    if find_spec("typeseg") is None:
        parser.error("the package typeseg is not installed: pip install 'typeseg==0.2.7', or the extra `stranger`")
    page = args.pop("out") / "index.html"
    with torch.no_grad():
        report = study(*load(), Options(**args))
    write_atomically(page, render(report, TEMPLATE).encode())
    show(report, page.resolve(), make_console())


if __name__ == "__main__":
    main()
