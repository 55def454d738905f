"""Measure a training's coders on held-out text and put them, in half precision, where the package finds them.

    python -m demos.dictionaries.bundle --run runs/dictionaries --valid valid.txt --to saes/pretrained/tinystories-4l

What is measured are the files as they are stored. Each coder is judged alone; those that predict the blocks' outputs,
and write dictionaries, are also judged with all layers replaced at once, each kind apart. Of coders that were
fine-tuned, --before names the folders of the trainings before; with --average the weights are the means over the ends
of the last so many of them and of RUN, which does better than each:

    python -m demos.dictionaries.bundle --run runs/writes-tuned --before runs/writes --text train.txt \\
        --valid valid.txt --to saes/pretrained/tinystories-told-4l
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from demos.dictionaries.cards import (
    REST,
    earlier_text,
    kept_sections,
    of_writes,
    others,
    stored_as,
    training_section,
    tuned_section,
)
from demos.dictionaries.tune import coders_in, mean_of
from demos.tinystories.data import windows
from demos.tinystories.text import read_stories
from demos.tinystories.tokenizer import encode_stream
from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.evaluation import evaluate
from saes.hub import push
from saes.report import Report, Scores
from saes.store import Capture, DataConfig, Rows, capture_to_memory, rows_of
from saes.targets import all_streams, read
from saes.training import calibrate, load_model

KEPT = (
    "fvu",
    "ev",
    "cosine",
    "l0",
    "ce_clean",
    "ce_spliced",
    "ce_zero",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl",
)
"""Figures that go with a coder; densities and the rest are in the evaluation's file."""

WRITTEN = ("mixer.hook_x", "attn.hook_v")
"""Sites of the values that enter a layer's memory."""


def held_out_rows(model: HookedModel, valid: Path) -> list[Rows]:
    """Rows of 256 tokens that predict every held-out token once."""
    stream = torch.tensor(encode_stream(model.tokenizer, read_stories(valid)))
    return [Rows(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in windows(stream, 256, batch=8)]


def calibrate_on(model: HookedModel, coders: dict[str, SparseCoder], text: Path, n_tokens: int = 2**14) -> None:
    """Thresholds such that k latents are active on average in a text; in the told stories of the mix more may be."""
    threshold = {n: c for n, c in coders.items() if c.cfg.architecture in ("batchtopk", "matryoshka")}
    if not threshold:
        return
    capture = Capture(model, all_streams([c.cfg for c in threshold.values()]))
    values = capture_to_memory(capture, rows_of(text, model, DataConfig()), n_tokens)
    for coder in threshold.values():
        calibrate(coder, read(coder.cfg, values)[0])


def last_dead_shares(run: Path) -> dict[str, float]:
    """Share of each coder's latents that were silent for long when training ended, from the run's log."""
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {key.removesuffix("/dead"): value for key, value in last.items() if key.endswith("/dead")}


def numbers(scores: Scores) -> dict[str, float]:
    """The figures that go with a coder."""
    found = {name: scores.values.get(name) for name in KEPT}
    return {name: round(value, 5) for name, value in found.items() if value is not None}


def groups(coders: dict[str, SparseCoder]) -> dict[str, dict[str, SparseCoder]]:
    """Coders that are judged together: at blocks' outputs or at what enters their memory, several layers, one kind."""
    at_outputs = {n: c for n, c in coders.items() if c.cfg.out_site.endswith("mixer.hook_out_proj")}
    found = {
        "write": {n: c for n, c in coders.items() if c.cfg.is_sae and c.cfg.out_site.endswith(WRITTEN)},
        "sae": {n: c for n, c in at_outputs.items() if c.cfg.is_sae},
        "mambacoder": {n: c for n, c in at_outputs.items() if not c.cfg.is_sae},
    }
    found["rest"] = {n: c for n, c in coders.items() if not any(n in group for group in found.values())}
    return {kind: group for kind, group in found.items() if group}


def measure(model: HookedModel, coders: dict[str, SparseCoder], rows: list[Rows]) -> dict[str, Report]:
    """A report for every group."""
    reports = {}
    for kind, group in groups(coders).items():
        reports[kind] = evaluate(model, group, rows, progress=False, together=kind != "rest" and len(group) > 1)
    return reports


def kept_reports(to: Path) -> dict[str, Any]:
    """The evaluation of other coders there."""
    report = to / "evaluation.json"
    return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}


def as_stored(coders: dict[str, SparseCoder], dtype: str) -> dict[str, SparseCoder]:
    """What is loaded of coders that were stored in a number format."""
    with tempfile.TemporaryDirectory() as scratch:
        push(coders, Path(scratch), dtype=dtype)
        return {name: SparseCoder.load(Path(scratch) / name) for name in coders}


def put(
    coders: dict[str, SparseCoder],
    model: HookedModel,
    valid: Path,
    to: Path,
    section: str,
    dtype: str = "float16",
    dead: dict[str, float] | None = None,
    folders: dict[str, Path] | None = None,
) -> dict[str, Report]:
    """Measure coders as they are stored, and store them with the figures.

    Parameters
    ----------
    section
        What the card says of their training; sections there under another heading stay.
    dead
        Shares of latents that were silent at the end of a training; None: in the held-out text.
    folders
        Where they were read from, if what else is recorded there is to stay.

    Raises
    ------
    ValueError
        A coder was trained on other weights than the model's.
    """
    for name, coder in coders.items():
        if coder.cfg.model_hash != model_hash(model):
            raise ValueError(f"{name} was trained on weights {coder.cfg.model_hash}, these are {model_hash(model)}")
    reports = measure(model, as_stored(coders, dtype), held_out_rows(model, valid))
    metrics: dict[str, dict[str, Any]] = {}
    for report in reports.values():
        for scores in report.coders:
            silent = scores.values["dead_share"] or 0.0
            metrics[scores.name] = {**numbers(scores), "dead_share": (dead or {}).get(scores.name, round(silent, 5))}
    everything, section = kept_reports(to), stored_as(section, dtype)
    section += others(kept_sections(to), section)
    push(folders or coders, to, dtype=dtype, metrics=metrics)
    everything |= {kind: report.to_dict() for kind, report in reports.items()}
    (to / "evaluation.json").write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with open(to / "README.md", "a", encoding="utf-8") as card:
        card.write(section)
    return reports


def bundle(
    run: Path,
    valid: Path,
    to: Path,
    model_name: str | None = None,
    dtype: str = "float16",
    text: Path | None = None,
    before: list[Path] | None = None,
    told: list[list[str]] | None = None,
    average: int = 1,
    onwards: bool = False,
    note: str = "",
    rest: str = REST,
) -> dict[str, Report]:
    """Put a training's coders where the package finds them; with `text`, thresholds are calibrated on it.

    Parameters
    ----------
    before
        The trainings before, the first one at the sites, of coders that `run` has fine-tuned.
    told
        For every stage the share of its rows that was sampled from models, and the models; None: half by the model
        itself in all of them.
    average
        How many stages' ends the weights are the means of: `run` and the last of `before`.
    onwards
        All of these stages went on from the write dictionaries that are there now, through the model.
    note
        A sentence for the card about these stages.
    rest
        One about the rows that no model told.

    Raises
    ------
    FileNotFoundError
        There is no coder.
    ValueError
        One was trained on other weights than the model's.
    """
    stages = [*(before or []), run]
    if not 1 <= average <= len(stages):
        raise ValueError(f"average must be from 1 to {len(stages)}, the stages that are named; got {average}")
    trained = mean_of([coders_in(stage) for stage in stages[-average:]])
    model = load_model(model_name or next(iter(trained.values())).cfg.model_name or "")
    if text is not None:
        trained = as_stored(trained, dtype)  # rounding moves a little what is active
        calibrate_on(model, trained, text)
    if before is None and not onwards:
        return put(trained, model, valid, to, training_section(run), dtype, last_dead_shares(run))
    told = told or [["0.5", model.cfg.model_name]] * len(stages)
    earlier = earlier_text(kept_sections(to)) if onwards else None
    return put(trained, model, valid, to, tuned_section(stages, told, average, earlier, note, rest), dtype)


def bundle_again(valid: Path, to: Path, dtype: str, model_name: str | None = None) -> dict[str, Report]:
    """Store the write dictionaries that are there in another number format, with figures measured anew.

    Raises
    ------
    FileNotFoundError
        There are none.
    """
    coders = coders_in(to, "write")
    model = load_model(model_name or next(iter(coders.values())).cfg.model_name or "")
    return put(
        coders, model, valid, to, of_writes(kept_sections(to)), dtype, folders={name: to / name for name in coders}
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demos.dictionaries.bundle", allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="folder of a finished training")
    which.add_argument(
        "--again", action="store_true", help="instead: the write dictionaries that are in TO now, stored as --dtype"
    )
    parser.add_argument("--before", type=Path, nargs="+", help="folders of the trainings that RUN went on from")
    parser.add_argument(
        "--told",
        nargs="+",
        action="append",
        metavar=("SHARE", "MODEL"),
        help="for every stage the share of its rows that models told, and which (default: half of them its own model)",
    )
    parser.add_argument(
        "--onwards", action="store_true", help="the stages went on from the write dictionaries that are in TO now"
    )
    parser.add_argument("--average", type=int, default=1, help="stages whose ends are averaged (default: %(default)s)")
    parser.add_argument("--note", default="", help="a sentence for the card about these stages")
    parser.add_argument("--rest", default=REST, help="one about the rows that no model told (default: %(default)s)")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--text", type=Path, help="text on which BatchTopK's thresholds are calibrated")
    parser.add_argument("--to", type=Path, required=True, help="folder to add the coders to")
    parser.add_argument("--model", help="name or folder of the model (default: the coders')")
    parser.add_argument("--dtype", default="float16", help="on disk (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.again:
        of_a_run = ("before", "told", "onwards", "average", "note", "rest", "text")
        given = [f"--{name}" for name in of_a_run if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"{', '.join(given)}: for --run; with --again coders and thresholds stay as they are")
    reports = (
        bundle_again(args.valid, args.to, args.dtype, args.model)
        if args.again
        else bundle(
            args.run,
            args.valid,
            args.to,
            args.model,
            args.dtype,
            args.text,
            args.before,
            args.told,
            args.average,
            args.onwards,
            args.note,
            args.rest,
        )
    )
    for report in reports.values():
        print(report)


if __name__ == "__main__":
    main()
