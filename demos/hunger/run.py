"""All stages of one model, and where its own concept fails, of the best of the others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from demos.hunger import ablation, activation, circuit, cutting, geometry, natural, planted, selection, steering, swap
from demos.hunger.claims import ESSENTIAL, judge
from demos.hunger.concepts import CONCEPTS, HUNGRY, OTHERS, Concept
from demos.hunger.planted_claims import judge_planted
from demos.hunger.stages import Found, Stages, source_hash
from demos.hunger.subject import Subject

SHARED, OWN = 2 + 2 * len(CONCEPTS), 10
"""Stages of a model, and of a concept that is studied."""


def case_study(subject: Subject, folder: Path, bar: tqdm | None = None, cut: bool = False) -> Found:
    """Everything about one model.

    Parameters
    ----------
    folder
        Stages go to `folder / model / concept`.
    cut
        Whether the claims about the planted cue are judged as well.
    """
    key = subject.key() | {"code": source_hash()}
    shared = Stages(folder / subject.name, key, bar)
    rest = shared.run("natural", lambda: natural.measure(subject))
    found: Found = {
        "planted": shared.run("planted", lambda: planted.measure(subject.model_name, subject.options.told)),
        "metrics": subject.metrics,
        "concepts": {},
    }
    stages = {c.name: Stages(shared.folder / c.name, key, bar) for c in CONCEPTS}
    chosen = {c.name: stages[c.name].run("selection", partial(selection.find, subject, c, rest)) for c in CONCEPTS}
    scored = {
        c.name: stages[c.name].run("scored", partial(selection.score, subject, c, chosen[c.name])) for c in CONCEPTS
    }
    found["selection"] = {name: summary(chosen[name], scored[name]) for name in chosen}

    def whole(concept: Concept) -> Found:
        before = {"chosen": chosen[concept.name], "scored": scored[concept.name]}
        return study(subject, concept, before, rest, stages[concept.name])

    found["concepts"][HUNGRY.name] = whole(HUNGRY)
    if cut:
        made = stages[HUNGRY.name].run("cutting", lambda: cutting.measure(subject, HUNGRY))
        claims = [claim.to_dict() for claim in judge_planted(made, subject.together)]
        found["cutting"] = made | {"claims": claims}
    failed = [c["name"] for c in found["concepts"][HUNGRY.name]["claims"] if c["name"] in ESSENTIAL and not c["holds"]]
    if failed:
        # By what the half to find on says, so that the other half still judges.
        if bar is not None:
            bar.total += OWN
        best = max(OTHERS, key=lambda c: (chosen[c.name]["auc"], chosen[c.name]["effect"]))
        found["concepts"][best.name] = whole(best)
    return found


def summary(chosen: Found, scored: Found) -> Found:
    """One feeling's latent in a line."""
    kept = {key: chosen[key] for key in ("coder", "layer", "feature", "auc", "effect")}
    return kept | {"scored_auc": scored["auc"], **{key: scored[key] for key in ("hindsight", "model_auc")}}


def study(subject: Subject, concept: Concept, before: Found, rest: Found, stages: Stages) -> Found:
    """All stages of one concept, and its claims.

    Parameters
    ----------
    before
        What was `chosen` and how it `scored`.
    rest
        Of `natural.measure`.
    """
    chosen = before["chosen"]
    how, graph = geometry.method(), stages.folder / "graph"
    results: dict[str, Any] = {
        **before,
        "metrics": subject.metrics[chosen["coder"]],
        "pairs": stages.run("pairs", lambda: selection.describe(subject, concept)),
        "sae": stages.run("sae", lambda: selection.best_sae(subject, concept)) if subject.saes else None,
        "activation": stages.run("activation", lambda: activation.measure(subject, concept, chosen, rest)),
        "geometry": stages.run("geometry", lambda: geometry.measure(subject, concept, chosen, rest)),
        "picture": stages.run(f"picture-{how}", lambda: geometry.picture(subject, concept, chosen, how)),
        "steering": stages.run("steering", lambda: steering.measure(subject, concept, chosen, rest)),
        "circuit": stages.run("circuit", lambda: circuit.measure(subject, concept, chosen)),
        "lead": stages.run(
            "lead", lambda: circuit.lead(subject, concept, chosen, graph), beside=[graph / "graph.json"]
        ),
        "swap": stages.run("swap", lambda: swap.measure(subject, concept, chosen)),
    }
    named = results["circuit"]["named"]
    results["ablation"] = stages.run(
        "ablation", lambda: ablation.measure(subject, concept, chosen, (named[0], named[1]))
    )
    results["claims"] = [claim.to_dict() for claim in judge(results)]
    return results
