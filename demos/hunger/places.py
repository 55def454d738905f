"""Where in a sentence the circuit of the word lies, counted from the cue: python -m demos.hunger.places

For every ninth of the sentences of `cutting`: what the lead changes by when the features of one position are cut in the
graph, by the position's distance from the cue, and what each word's embedding adds to the lead over all paths.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict

import torch

from circuits import FrozenModel, Logit, build_graph, total_effects
from demos.hunger.concepts import END, HUNGRY
from demos.hunger.cutting import FEATURES, WORDS, change, sentences
from demos.hunger.options import Options
from demos.hunger.stages import Found
from demos.hunger.subject import Subject


@torch.no_grad()
def measure(subject: Subject, every: int = 9) -> Found:
    """Means by distance from the cue, and where the largest of each sentence are.

    Parameters
    ----------
    every
        One sentence of so many.
    """
    cut: dict[int, list[float]] = defaultdict(list)
    added: dict[int, list[float]] = defaultdict(list)
    largest: Counter[int] = Counter()
    at_cue: list[bool] = []
    shared = len(subject.model.to_tokens("." + END, prepend_bos=False)[0])
    for pair in sentences(HUNGRY, WORDS)[::every]:
        frozen = FrozenModel(subject.model, pair.cue, list(subject.coders.values()))
        target = Logit(HUNGRY.word, minus=HUNGRY.against)
        graph = build_graph(frozen, target, max_heads=0, max_features=FEATURES)
        ids = [subject.model.to_tokens(text, prepend_bos=False)[0].tolist() for text in (pair.cue, pair.swapped)]
        cue = pair.differing(*ids)
        own = range(len(ids[0]) - shared)
        at = torch.tensor([node.position if node.kind == "feature" else -1 for node in graph.nodes])
        effects = total_effects(graph)
        words = {node.position: float(effects[i]) for i, node in enumerate(graph.nodes) if node.kind == "embed"}
        changes = {p: change(graph, at == p) for p in own}
        for p in own:
            cut[p - cue[0]].append(changes[p])
            added[p - cue[0]].append(words.get(p, 0.0))
        largest[min(own, key=lambda p, changes=changes: changes[p]) - cue[0]] += 1
        at_cue.append(max(own, key=lambda p, words=words: words.get(p, 0.0)) in cue)
    return {
        "sentences": len(at_cue),
        "cut": {place: sum(values) / len(values) for place, values in sorted(cut.items())},
        "embeddings": {place: sum(values) / len(values) for place, values in sorted(added.items())},
        "largest": dict(largest),
        "embedding at the cue": sum(at_cue),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m demos.hunger.places", allow_abbrev=False)
    parser.add_argument("--model", default="tinystories-told-4l/write", help="as --models of the case study")
    args = parser.parse_args(argv)
    for name, value in measure(Subject.load(args.model, Options())).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
