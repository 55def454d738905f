"""Through which heads does the latent see the cue?

A head is a (layer, channel, source): what a token sends through all taps of one channel's convolution and its scan; in
a layer of attention, through one of its heads (`heads`). Norms, gates and selection are held at the run, so that
effects sum to the latent's pre-activation exactly.
"""

from __future__ import annotations

from pathlib import Path

import torch

from circuits import (
    Feature,
    FrozenModel,
    Logit,
    attribute,
    build_graph,
    patch_effects,
    prune,
    save_graph,
    scores,
    top_paths,
    trace_paths,
)
from demos.hunger import heads
from demos.hunger.concepts import Concept
from demos.hunger.stages import Found
from demos.hunger.stats import mean_interval
from demos.hunger.subject import Subject

PARTS = ("value", "selection", "gates")
PATHS = 8
STEPS, LENGTH = 4, 3
"""Of the published method: paths of each length, and the most edges."""
HEADS, FEATURES = 100, 100
"""Nodes of the graph, at most."""


def measure(subject: Subject, concept: Concept, found: Found) -> Found:
    """The study's prompt taken apart, and every scored sentence's strongest head."""
    coder = subject.coders[found["coder"]]
    frozen = FrozenModel(subject.model, concept.prompt)
    feature = Feature(coder, found["feature"])
    made = attribute(frozen, targets=feature)
    cue = cue_places(subject, concept)
    every = heads.strongest(subject, made)
    named = next(head for head in every if head[2] in cue)
    graph = build_graph(frozen, feature, max_heads=HEADS)
    paths = top_paths(graph, PATHS)
    return {
        "prompt": concept.prompt,
        "tokens": frozen.words,
        "cue": list(cue),
        "target": float(made.target[0]),
        "residual": float(made.residual[0]),
        "embeddings": made.embeddings[0].tolist(),
        "heads": [list(head) for head in every[:12]],
        "named": list(named),
        "paths": [[str(path), path.weight] for path in paths],
        "remainder": paths.remainder,
        "nodes": len(graph),
        "patched": patched(frozen, feature, concept, cue),
        "published": published(subject, concept, feature) if subject.kind == "block" else None,
        "scored": strongest_heads(subject, concept, found),
    }


def published(subject: Subject, concept: Concept, feature: Feature) -> Found:
    """The same prompt by the published method: its largest paths, and the head that adds most."""
    frozen = FrozenModel(subject.model, concept.prompt, list(subject.coders.values()))
    found = trace_paths(frozen, feature, k=STEPS, length=LENGTH, preset="mambacoder")
    E = subject.model.cfg.E
    largest = [(layer, int(e.argmax()) % E, int(e.argmax()) // E, float(e.max())) for layer, e in found.heads.items()]
    best = max(largest, key=lambda head: head[3])
    return {
        "head": list(best),
        "steps": [
            {"paths": [[str(path), path.weight] for path in paths], "remainder": paths.remainder}
            for paths in found.paths
        ],
    }


def patched(frozen: FrozenModel, feature: Feature, concept: Concept, cue: range) -> Found | None:
    """The real effect of having the cue's token and not the other's, by value, selection and gates.

    None where the cue is not one token for one.
    """
    ids = frozen.model.to_tokens(concept.pairs("score")[0].swapped, prepend_bos=False)[0].tolist()
    if len(cue) != 1 or len(ids) != frozen.length:
        return None
    made = patch_effects(frozen, target=feature, replace_by=ids[cue[0]], positions=[cue[0]])
    orders = {
        name: {part: float(getattr(split, part)[0]) for part in PARTS}
        for name, split in (("forward", made.forward), ("reverse", made.reverse))
    }
    words = {"token": frozen.words[cue[0]], "by": frozen.model.to_single_str_token(ids[cue[0]])}
    return {**words, "effect": float(made.effect[0]), **orders}


def cue_places(subject: Subject, concept: Concept) -> range:
    """Where the cue stands in the study's prompt."""
    pair = concept.pairs("score")[0]
    ids = [subject.model.to_tokens(text, prepend_bos=False)[0].tolist() for text in (pair.cue, pair.swapped)]
    return pair.differing(*ids)


def strongest_heads(subject: Subject, concept: Concept, found: Found) -> Found:
    """In every scored sentence: does the head with the largest effect read the cue? And the embedding?"""
    pairs = concept.pairs("score", subject.options.words)
    feature = Feature(subject.coders[found["coder"]], found["feature"])
    by_head, by_token, chance = [], [], []
    for pair in pairs:
        ids = [subject.model.to_tokens(text, prepend_bos=False)[0].tolist() for text in (pair.cue, pair.swapped)]
        cue = pair.differing(*ids)
        made = attribute(FrozenModel(subject.model, pair.cue), targets=feature)
        by_head.append(heads.strongest(subject, made, 1)[0][2] in cue)
        by_token.append(int(made.embeddings[0].abs().argmax()) in cue)
        chance.append(len(cue) / len(ids[0]))
    options = subject.options
    return {
        "heads": mean_interval(torch.tensor(by_head).double(), options.resamples, options.seed),
        "tokens": mean_interval(torch.tensor(by_token).double(), options.resamples, options.seed),
        "chance": sum(chance) / len(chance),
    }


def lead(subject: Subject, concept: Concept, found: Found, folder: Path) -> Found:
    """The lead of the word on the prompt as a graph: the latent's layer read through its MambaCoder, heads elsewhere.

    The graph goes to `folder`; what is returned says how much of the lead it explains and what the latent adds to it.
    """
    coder = subject.coders[found["coder"]]
    frozen = FrozenModel(subject.model, concept.prompt, [coder])
    target = Logit(concept.word, minus=concept.against)
    graph = build_graph(frozen, target, max_heads=HEADS, max_features=FEATURES)
    pruned = prune(graph).graph
    save_graph(pruned, folder)
    explained, paths = scores(graph), top_paths(graph, PATHS)
    key = ("feature", coder.cfg.layer, frozen.length - 1, found["feature"])
    direct = [float(graph.weights[0, i]) for i, node in enumerate(graph.nodes) if node.key == key]
    return {
        "target": target.label,
        "value": paths.value,
        "replacement": explained.replacement,
        "completeness": explained.completeness,
        "latent": direct[0] if direct else 0.0,
        "nodes": {"whole": len(graph), "pruned": len(pruned)},
        "paths": [[str(path), path.weight] for path in paths],
        "remainder": paths.remainder,
    }
