"""Through which heads does the latent see the cue?

A head is a (layer, channel, source): what a token sends through all taps of one channel's convolution and its scan.
Norms, gates and selection are held at the run, so that effects sum to the latent's pre-activation exactly.
"""

from __future__ import annotations

from typing import Any

import torch

from circuits import Feature, FrozenModel, Graph, Logit, attribute, build_graph, prune, scores, top_paths
from demos.hunger.concepts import Concept
from demos.hunger.selection import sides
from demos.hunger.stages import Found
from demos.hunger.stats import mean_interval
from demos.hunger.subject import Subject

PATHS = 8
HEADS, FEATURES = 100, 100
"""Nodes of the graph, at most."""


def measure(subject: Subject, concept: Concept, found: Found) -> Found:
    """The study's prompt taken apart, and every scored sentence's strongest head."""
    coder = subject.coders[found["coder"]]
    frozen = FrozenModel(subject.model, concept.prompt)
    feature = Feature(coder, found["feature"])
    made = attribute(frozen, targets=feature)
    cue = cue_places(subject, concept)
    tops = made.top_heads(12, source="token")
    at_cue = [head for head in made.top_heads(10_000, source="token") if head[2] in cue]
    graph = build_graph(frozen, feature, max_heads=HEADS)
    paths = top_paths(graph, PATHS)
    return {
        "prompt": concept.prompt,
        "tokens": frozen.words,
        "cue": list(cue),
        "target": float(made.target[0]),
        "residual": float(made.residual[0]),
        "embeddings": made.embeddings[0].tolist(),
        "heads": [list(head) for head in tops],
        "named": list(at_cue[0]) if at_cue else None,
        "paths": [[str(path), path.weight] for path in paths],
        "remainder": paths.remainder,
        "scored": strongest_heads(subject, concept, found),
    }


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
        by_head.append(made.top_heads(1, source="token")[0][2] in cue)
        by_token.append(int(made.embeddings[0].abs().argmax()) in cue)
        chance.append(len(cue) / len(ids[0]))
    options = subject.options
    return {
        "heads": mean_interval(torch.tensor(by_head).double(), options.resamples, options.seed),
        "tokens": mean_interval(torch.tensor(by_token).double(), options.resamples, options.seed),
        "chance": sum(chance) / len(chance),
    }


def lead_graph(subject: Subject, concept: Concept, found: Found) -> Graph:
    """The word's lead on the study's prompt, the latent's layer read through its MambaCoder, heads elsewhere."""
    coder = subject.coders[found["coder"]]
    frozen = FrozenModel(subject.model, concept.prompt, [coder])
    target = Logit(concept.word, minus=concept.against)
    return build_graph(frozen, target, max_heads=HEADS, max_features=FEATURES)


def about_graph(graph: Graph, found: Found) -> dict[str, Any]:
    """How much of the lead the graph explains, and what the latent adds to it directly."""
    explained = scores(graph)
    last = max(node.position for node in graph.nodes)
    layer = int(found["coder"].split("-")[0].removeprefix("l"))
    direct = [
        float(graph.weights[0, i])
        for i, node in enumerate(graph.nodes)
        if node.key == ("feature", layer, last, found["feature"])
    ]
    paths = top_paths(graph, PATHS)
    return {
        "value": paths.value,
        "replacement": explained.replacement,
        "completeness": explained.completeness,
        "latent": direct[0] if direct else 0.0,
        "nodes": {"whole": len(graph), "pruned": len(prune(graph).graph)},
        "paths": [[str(path), path.weight] for path in paths],
        "remainder": paths.remainder,
    }
