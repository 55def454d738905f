"""The report: claims of all models first, failures and all, then what was measured; one page a model and concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuits import Graph, load_graph
from circuits.viewer import circuit_page
from demos.hunger.claims import ESSENTIAL, span
from demos.hunger.concepts import CONCEPTS, HUNGRY
from demos.hunger.sections import sections, taught
from demos.hunger.stages import Found
from demos.studies.report import Report, Section, Table, render
from demos.tinystories.checkpoint import write_atomically
from demos.wording import listed

EVERY = (
    "The latent that was chosen for each of them, its area on both halves, the largest area of any latent on the very"
    " half that scores, and that of the model's own lead of the word: how well it tells the sentences apart when it"
    " speaks."
)
TEMPLATE = Path(__file__).with_name("case_study.html")
SOURCE = (
    "After the MambaCoder post by L. Ruggeri (2026), whose story is about another model. Thresholds, sentences and"
    " seeds were fixed before any result was seen; of what the gates judge, the dictionaries' own figures were known."
)


def write_pages(results: Found, out: Path) -> list[Path]:
    """report.html, one page for every other model and concept, and the circuits' pages."""
    runs = [(model, name) for model, found in results["models"].items() for name in found["concepts"]]
    first, *rest = runs
    written = []
    links = [(f"{model}: {name}", page_name(model, name)) for model, name in rest]
    links += [(f"The circuit in {model}: {name}", f"{model}/{name}/circuit.html") for model, name in runs]
    for model, name in runs:
        is_first = (model, name) == first
        found = results["models"][model]
        shown = Report(
            name,
            "A feature that reads like hunger?" if is_first else f"{model}: {name}",
            headline(results) if is_first else standing(found["concepts"][name], model, name),
            SOURCE,
            f"Below the claims: {model}, {name}." if is_first else model,
            [*(search_sections(results) if is_first else []), *of_run(model, found, name)],
        )
        groups = claim_groups(results) if is_first else [alone(found["concepts"][name], model)]
        page = out / ("report.html" if is_first else page_name(model, name))
        around = {
            "outcome": verdicts(results) if is_first else [],
            "links": links if is_first else [("All claims", "report.html")],
        }
        text = render(shown, TEMPLATE, groups=groups, **around)
        write_atomically(page, text.encode())
        graph = named(load_graph(out / model / name / "graph"), found["concepts"][name]["chosen"], name)
        circuit_page(graph, f"{model}: {name}").save(out / model / name / "circuit.html")
        written.append(page)
    return written


def named(graph: Graph, chosen: Found, name: str) -> Graph:
    """The graph with the chosen latent called by the feeling."""
    place = ("feature", chosen["layer"], chosen["feature"])
    return graph.renamed(
        {i: name for i, node in enumerate(graph.nodes) if (node.kind, node.layer, node.index) == place}
    )


def page_name(model: str, concept: str) -> str:
    """The file of a model's and concept's own page."""
    return f"{model.replace('/', '-')}-{concept}.html"


def of_run(model: str, found: Found, name: str) -> list[Section]:
    """What was measured about a model and concept."""
    word = next(concept.word for concept in CONCEPTS if concept.name == name)
    planted = taught(model, found["planted"], name)
    return sections(planted, word, found["concepts"][name])


def failures(study: Found) -> list[str]:
    """Names of the claims that do not hold."""
    return [claim["name"] for claim in study["claims"] if not claim["holds"]]


def standing(study: Found, model: str, name: str) -> str:
    """How many claims hold, and which do not."""
    failed, total = failures(study), len(study["claims"])
    if not failed:
        return f"On {model} all {total} claims about “{name}” hold."
    return f"On {model} {total - len(failed)} of {total} claims about “{name}” hold. Failed: “{'”, “'.join(failed)}”."


def headline(results: Found) -> str:
    """Whether there is a feature of hunger, and which claims that it rests on fail where."""
    failing = {m: set(failures(found["concepts"][HUNGRY.name])) for m, found in results["models"].items()}
    passing = [model for model, failed in failing.items() if not failed.intersection(ESSENTIAL)]
    if len(passing) == len(failing):
        return f"A latent passes for hunger on {listed(passing)}."
    said = f"A latent passes for hunger on {listed(passing)} alone." if passing else "No latent passes for hunger."
    where: dict[tuple[str, ...], list[str]] = {}
    for claim in ESSENTIAL:
        where.setdefault(tuple(model for model, failed in failing.items() if claim in failed), []).append(f"“{claim}”")
    parts = []
    for on, claims in where.items():
        if on:
            models = "all" if 1 < len(on) == len(failing) else listed(on)
            parts.append(f"{listed(claims)} {'fail' if claims[1:] else 'fails'} on {models}")
    return f"{said} {'; '.join(parts)}."


def verdicts(results: Found) -> list[str]:
    """Every model and concept in a sentence or two, failures by name."""
    return [
        standing(study, model, name)
        for model, found in results["models"].items()
        for name, study in found["concepts"].items()
    ]


def claim_groups(results: Found) -> list[dict[str, Any]]:
    """Tables of claims: hunger on all models, then what each model had instead."""
    hunger = {model: found["concepts"][HUNGRY.name] for model, found in results["models"].items()}
    groups = [group("The claims about hunger", "Failures are part of the result.", hunger)]
    cut = {model: found["cutting"] for model, found in results["models"].items() if "cutting" in found}
    if cut:
        text = (
            "What can be claimed because the cause was planted: does the circuit of the word go through the cue, and"
            " does cutting it there move the word as the graph says (`demos/hunger/cutting.py`)?"
        )
        groups.append(group("The claims about the planted cue", text, cut))
    instead = {
        f"{name}, {model}": study
        for model, found in results["models"].items()
        for name, study in found["concepts"].items()
        if name != HUNGRY.name
    }
    if instead:
        text = (
            "Where no feature of hunger held up, the feeling whose latent did best on the half to find on was taken"
            " from a fixed list, by the same script, and judged by the same claims."
        )
        groups.append(group("The best other feeling", text, instead))
    return groups


def alone(study: Found, model: str) -> dict[str, Any]:
    """The claims of one model and concept."""
    return group("The claims", "", {model: study})


def group(heading: str, text: str, studies: dict[str, Found]) -> dict[str, Any]:
    """One table: claims down, studies across."""
    lists = [study["claims"] for study in studies.values()]
    rows = [(cells[0], list(cells)) for cells in zip(*lists, strict=True)]
    return {"heading": heading, "text": text, "columns": list(studies), "rows": rows}


def search_sections(results: Found) -> list[Section]:
    """What was planted, and the best latent of every feeling on the half to find on."""
    rows = []
    for model, found in results["models"].items():
        for name, one in found["selection"].items():
            label = f"{model}: {name}" + (" (studied)" if name in found["concepts"] else "")
            areas = [f"{one['auc']:.2f}", span(one["scored_auc"]), f"{one['hindsight']:.2f}", f"{one['model_auc']:.2f}"]
            rows.append([label, f"{one['coder']}, {one['feature']}", *areas])
    planted = " ".join(taught(model, found["planted"], HUNGRY.name) for model, found in results["models"].items())
    columns = ["feeling", "latent", "AUC, find", "AUC, score (95%)", "best with hindsight", "the model's own"]
    return [
        Section("What was planted", planted),
        Section("All feelings", EVERY, Table(columns, rows, texts=2)),
    ]
