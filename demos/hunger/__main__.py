"""Run the case study: python -m demos.hunger"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from circuits import load_graph
from circuits.files import to_circuit_tracer
from demos.dictionaries.text import MIXES
from demos.hunger import figures
from demos.hunger.concepts import HUNGRY
from demos.hunger.document import document
from demos.hunger.options import Options, parse_args
from demos.hunger.page import headline, verdicts, write_pages
from demos.hunger.run import OWN, SHARED, case_study
from demos.hunger.stages import Found
from demos.hunger.subject import Subject
from demos.tinystories.checkpoint import write_atomically
from demos.tour.terminal import make_console
from hooked_mamba import __version__


def main(argv: list[str] | None = None) -> int:
    """Measure, judge, write; 2 if a model or its dictionaries are not there."""
    args = parse_args(argv)
    try:
        with torch.no_grad():
            results = measured(args.models, args.options, args.out, args.cut)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(results, args.out)
    if args.document:
        write_atomically(args.document, document(results).encode())
    console = make_console()
    for line in [headline(results), *verdicts(results)]:
        console.print(line, markup=False)
    console.print(f"\nThe report: [bold]{(args.out / 'report.html').resolve()}[/]", soft_wrap=True)
    return 0


def measured(models: list[str], options: Options, out: Path, cut: bool = False) -> Found:
    """All models; what is in `out` already and still holds is not measured again.

    Parameters
    ----------
    cut
        Judge the claims about the planted cue on those models that were told by nouns alone.
    """
    subjects = [Subject.load(name, options) for name in models]
    found = {}
    with tqdm(total=len(subjects) * (SHARED + OWN + cut), desc="stages", disable=None) as bar:
        for subject in subjects:
            found[subject.name] = case_study(subject, out, bar, cut and is_told(subject))
    return {"version": __version__, "options": options.to_dict(), "models": found}


def is_told(subject: Subject) -> bool:
    """Whether stories in which a noun alone tells the feeling were planted in a model."""
    mix = MIXES.get(subject.model_name)
    return mix is not None and mix.cues > 0


def write(results: Found, out: Path) -> None:
    """results.json, the first study's graph.json and figures, and the pages."""
    write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
    first = next(iter(results["models"]))
    graph = load_graph(out / first / HUNGRY.name / "graph")
    drawn = to_circuit_tracer(graph, f"{first.replace('/', '-')}-{HUNGRY.name}")
    write_atomically(out / "graph.json", json.dumps(drawn, indent=1, allow_nan=False).encode() + b"\n")
    study = results["models"][first]["concepts"][HUNGRY.name]
    for name, plot in {
        "activations": figures.activations(study["scored"]),
        "turned-up": figures.beside_controls(study["activation"]["rows"], "effect", "nats"),
        "steering": figures.beside_controls(study["steering"]["rows"], "gain", "gain", percent=True),
        "embeddings": figures.picture(study["picture"]),
        "tokens": figures.tokens_map(study["circuit"]),
    }.items():
        write_atomically(out / "figures" / f"{name}.json", plot.figure.to_json(pretty=True).encode() + b"\n")
    write_pages(results, out)


if __name__ == "__main__":
    sys.exit(main())
