"""Which choice of nodes recovers most, on prompts that no document uses: `python -m tests.circuits.choices`.

Prompts are written by the bundled models themselves from seeds; each is cut after 12 tokens, and what is explained is
the lead of the likeliest next token over the second. Every choice gets as many nodes as the circuit by influence has.
"""

from __future__ import annotations

import argparse
from statistics import mean, median

import torch

from circuits.build import build_graph
from circuits.extract import _metric, within
from circuits.faithfulness import recovery
from circuits.frozen_model import FrozenModel
from circuits.integrated import node_effects
from circuits.targets import Logit
from hooked_mamba.models import load_model
from saes import SparseCoder

CODERS = ("l1-mambacoder", "l2-mambacoder", "l3-mambacoder")


LEAD = 1.5
"""Smallest lead of a prompt, in logits: of a smaller one any share can be recovered by chance."""


def prompts(model, n: int, length: int = 12) -> list[torch.Tensor]:
    """Pieces of stories, each from another seed, whose next token leads clearly."""
    found: list[torch.Tensor] = []
    seed = 1000
    while len(found) < n:
        generator = torch.Generator().manual_seed(seed)
        tokens = model.generate("Once", length + 20, generator=generator, verbose=False, return_type="tokens")
        first = seed % 8  # not always a story's first words
        tokens, seed = tokens[:, first : first + length], seed + 1
        best = model(tokens)[0, -1].topk(2).values
        if best[0] - best[1] >= LEAD:
            found.append(tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100])
    args = parser.parse_args()
    for name in ("tinystories-4l", "tinystories-4l-real"):
        model = load_model(name)
        for coders in (CODERS, ()):
            made = [SparseCoder.from_pretrained(f"{name}/{coder}") for coder in coders]
            for budget in args.budgets:
                report(name, model, made, budget, args.prompts)


def report(name: str, model, coders: list[SparseCoder], budget: int, n: int) -> None:
    shares: dict[str, list[float]] = {"influence": [], "integrated": [], "gradient": []}
    for tokens in prompts(model, n):
        frozen = FrozenModel(model, tokens, coders)
        best = model(tokens)[0, -1].topk(2).indices.tolist()
        target = Logit(best[0], minus=best[1])
        metric = _metric(frozen, target)
        graph = within(build_graph(frozen, [target], max_features=2 * budget, max_heads=budget), budget)
        found = recovery(frozen, graph, metric, randoms=0)
        shares["influence"].append(found.circuit)
        shares["gradient"].append(found.gradient)
        keep = node_effects(frozen, metric).largest(found.nodes)
        shares["integrated"].append(recovery(frozen, keep, metric, randoms=0).circuit)
    what = "coders" if coders else "heads alone"
    for choice, values in shares.items():
        off = [abs(1 - value) for value in values]
        print(
            f"{name} {what}, at most {budget} nodes, {choice:10}: recovered {median(values):.0%} (median),"
            f" distance from 100% {mean(off):.2f} (mean) {median(off):.2f} (median),"
            f" within 10% in {mean(x <= 0.1 for x in off):.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
