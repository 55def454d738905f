"""Does the traced circuit go through the planted cue, and does cutting it there move the word as the graph says?

The cause is known here: in sentences with food the model's lead of " hungry" comes from the food. For 200 sentences:

1. The lead is traced to a graph of the dictionaries' features, errors and embeddings.
2. The features at the cue's positions, in all layers, are set to 0 in the graph, and the change follows its edges:

       change of node n = sum over m of (weight of m on n) e_m,    e_m = -1 at the cut, else (change of m) / (m's value)

   Errors are held. The same is done at every other word, to see whether the cue's is the place that matters most.
3. In the real model the same features are set to 0; what the dictionaries miss stays, and nothing is held.

Where the graph is right the two changes are equal; the slope and the correlation over sentences say how near they are.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits import FrozenModel, Graph, Logit, build_graph, scores
from demos.hunger import stats
from demos.hunger.concepts import END, Concept, Pair
from demos.hunger.stages import Found
from demos.hunger.subject import Sentences, Subject, ends
from demos.tinystories.leads import lead_area
from saes import splice

WORDS = 20
"""Words put into each of the ten frames with a cue: those of both halves, and of MORE as many as are lacking."""
MORE = ("cereal", "chocolate", "pudding", "chicken", "turkey", "fish", "popcorn", "ham", "stew", "bacon")
FEATURES = 1000
"""Features of a graph that are traced on, at most."""


def sentences(concept: Concept, words: int) -> list[Pair]:
    """Sentences with a cue, each with the same sentence about another word."""
    cues = (*concept.find.cues, *concept.score.cues, *MORE)[:words]
    others = (*concept.find.others, *concept.score.others, *concept.find.others)[:words]
    frames = [frame for half in (concept.find, concept.score) for frame, _ in half.frames]
    found = []
    for f, frame in enumerate(frames):
        for w, (cue, other) in enumerate(zip(cues, others, strict=True)):
            text, swapped = frame.format(cue) + END, frame.format(other) + END
            found.append(Pair(text, swapped, swapped, swapped, f, w))
    return found


def change(graph: Graph, cut: Bool[Tensor, " n"]) -> float:
    """What the target changes by when the cut features are 0, along all paths of the graph."""
    size = torch.tensor([node.activation if node.kind == "feature" else node.value for node in graph.nodes])
    share = torch.where(size == 0, 0.0, 1 / size).to(graph.weights.dtype)
    features = graph.where("feature")
    target = int(graph.where("target").nonzero()[0, 0])
    e = -cut.to(graph.weights.dtype)
    while True:  # features act on layers above alone, so that this ends
        after = torch.where(cut, -1.0, torch.where(features, (graph.weights @ e) * share, 0.0))
        if torch.equal(after, e):
            return float(graph.weights[target] @ e)
        e = after


def measure(subject: Subject, concept: Concept) -> Found:
    """Predicted and real changes of the lead, sentence by sentence."""
    pairs = sentences(concept, min(WORDS, 2 * subject.options.words + 4))
    predicted, elsewhere, largest, chance, explained = [], [], [], [], []
    generator = torch.Generator().manual_seed(subject.options.seed + 3)
    shared = len(subject.model.to_tokens("." + END, prepend_bos=False)[0])
    cues, other_places = [], []
    for pair in pairs:
        frozen = FrozenModel(subject.model, pair.cue, list(subject.coders.values()))
        graph = build_graph(frozen, Logit(concept.word, minus=concept.against), max_heads=0, max_features=FEATURES)
        ids = [subject.model.to_tokens(text, prepend_bos=False)[0].tolist() for text in (pair.cue, pair.swapped)]
        cue = pair.differing(*ids)
        places = range(len(ids[0]) - shared)  # all but the end that all sentences share
        at = torch.tensor([node.position if node.kind == "feature" else -1 for node in graph.nodes])
        by_place = {p: change(graph, at == p) for p in places}
        rest = [p for p in places if p not in cue]
        other = rest[int(torch.randint(len(rest), (), generator=generator))]
        predicted.append(change(graph, torch.isin(at, torch.tensor(list(cue)))))
        elsewhere.append(by_place[other])
        largest.append(min(by_place, key=lambda p: by_place[p]) in cue)
        chance.append(len(cue) / len(places))
        explained.append(list(scores(graph)))
        cues.append(list(cue))
        other_places.append([other])
    real, real_elsewhere = (lead_change(subject, concept, pairs, where) for where in (cues, other_places))
    options = subject.options
    x, y = torch.tensor(predicted).double(), real.double()
    return {
        "sentences": len(pairs),
        "through": stats.mean_interval(torch.tensor(largest).double(), options.resamples, options.seed),
        "chance": sum(chance) / len(chance),
        "predicted": predicted,
        "real": real.tolist(),
        "slope": stats.bootstrap(lambda i: slope(x[i], y[i]), len(x), options.resamples, options.seed),
        "correlation": stats.bootstrap(lambda i: correlation(x[i], y[i]), len(x), options.resamples, options.seed),
        "lower": float((real < real_elsewhere).double().mean()),
        "elsewhere": {"predicted": elsewhere, "real": real_elsewhere.tolist()},
        "replacement": sum(one[0] for one in explained) / len(explained),
        "completeness": sum(one[1] for one in explained) / len(explained),
        "model_auc": lead_area(subject.model, concept, "score", options.words),
    }


def lead_change(subject: Subject, concept: Concept, pairs: list[Pair], places: list[list[int]]) -> Float[Tensor, " b"]:
    """The real change of the lead with all features at some places of each sentence set to 0, errors kept."""
    rows = Sentences.of(subject.model, [pair.cue for pair in pairs])
    mask = torch.zeros_like(rows.mask, dtype=torch.bool)
    for i, where in enumerate(places):
        mask[i, rows.columns(i, where)] = True
    word, against = subject.token(concept.word), subject.token(concept.against)

    def lead() -> Tensor:
        return ends(subject, rows).lead(word, against)

    before = lead()
    edits = dict.fromkeys(subject.coders, torch.zeros_like)
    with splice(subject.model, subject.coders, error=True, features=edits, positions=mask):
        return lead() - before


def slope(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Least squares, of y on x; 0 where x does not vary."""
    x = x - x.mean()
    square = float(x @ x)
    return float(x @ (y - y.mean())) / square if square > 0 else 0.0


def correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson's; 0 where either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else 0.0
