"""How much of an answer small circuits recover: python -m demos.localisation.circuits

For each prompt that the model answers right, the heads (layer, channel, source) that are kept are chosen in four ways,
as many each time; all others are ablated to their mean over other prompts. What is measured is the lead of the
answer's logit over the mean of the tokens that could be the answer: in recall the prompt's other values, in induction
its other tokens. 1 is the lead of the whole model, 0 that of the model with every head ablated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from circuits import FrozenModel, Logit, build_graph, node_effects
from circuits.faithfulness import recovery
from demos.localisation.study import correct_prompts, load
from demos.localisation.task import Task
from demos.tour.terminal import make_console
from hooked_mamba import HookedModel
from hooked_mamba.analysis.tasks import Prompts

WAYS = {
    "integrated": "what ablating a head does (integrated gradients)",
    "influence": "what a head adds along the frozen paths",
    "gradient": "gradient x activation",
    "random": "at random",
}
REFERENCES = 64
"""Prompts whose mean stands in for what is ablated."""


@dataclass(frozen=True)
class Recovered:
    """One task's prompts: how much each way's circuits recover, prompt by prompt."""

    task: Task
    nodes: int
    heads: int
    """Heads of a prompt, of which nodes were chosen: channels, attention heads, neurons and experts at a position."""
    by_way: dict[str, list[float]]

    def mean(self, way: str) -> float:
        """Mean recovered share."""
        return statistics.mean(self.by_way[way])

    def off(self, way: str) -> float:
        """Mean distance from 1: too much is as wrong as too little."""
        return statistics.mean(abs(1 - x) for x in self.by_way[way])


def target_of(task: Task, prompts: Prompts, row: int) -> Logit:
    """The answer's lead over the mean of the tokens that stand where an answer may stand."""
    tokens, answer = prompts.tokens[row], int(prompts.answers[row])
    candidates = tokens[1::2] if task.name == "recall" else tokens
    others = sorted({int(token) for token in candidates} - {answer})
    return Logit(answer, minus=list(others))


def recovered(
    model: HookedModel, task: Task, n: int = 50, nodes: int = 200, seed: int = 0, progress: bool = False
) -> Recovered:
    """Circuits of n prompts.

    Parameters
    ----------
    n
        Prompts, all answered right.
    nodes
        Heads that a circuit may have.
    seed
        Of the prompts; those that ablated heads are set to the mean of have the next.
    """
    prompts, _ = correct_prompts(model, task, n, seed)
    reference = FrozenModel(model, task.prompts(REFERENCES, seed + 1).tokens)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    heads = 0
    for row in tqdm(range(n), desc=task.name, disable=not progress):
        frozen = FrozenModel(model, prompts.tokens[row : row + 1])
        target = target_of(task, prompts, row)

        def metric(logits: Tensor, target: Logit = target, frozen: FrozenModel = frozen) -> Tensor:
            return target.of(logits[:, -1], frozen)

        effects = node_effects(frozen, metric, reference=reference)
        best, heads = effects.largest(nodes), sum(part.numel() for part in effects.heads.values())
        by_effect = recovery(frozen, best, metric, reference=reference, randoms=1, seed=seed + row)
        paths = build_graph(frozen, target, max_heads=nodes)
        by_influence = recovery(frozen, paths, metric, reference=reference, randoms=0)
        found["integrated"].append(by_effect.circuit)
        found["influence"].append(by_influence.circuit)
        found["gradient"].append(by_effect.gradient)
        found["random"].append(by_effect.random[0])
    return Recovered(task, nodes, heads, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both tasks and print a table."""
    parser = argparse.ArgumentParser(prog="python -m demos.localisation.circuits", allow_abbrev=False)
    parser.add_argument(
        "models", nargs="*", default=["recall", "induction"], help="names or folders (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, help="pairs of a prompt, or its length (default: as trained)")
    parser.add_argument("--prompts", type=int, default=50, help="prompts a task (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=200, help="heads of a circuit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("prompts", "nodes", "size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    console = make_console()
    for name in args.models:
        model, task = load(name)
        task = task if args.size is None else Task(task.name, args.size, task.vocab)
        one = recovered(model, task, args.prompts, args.nodes, args.seed, progress=sys.stderr.isatty())
        title = f"{name} ({model.cfg.n_layers} blocks): {one.nodes} of {one.heads} heads, {args.prompts} prompts"
        table = Table(title=title, title_justify="left")
        for column in ("heads chosen by", "recovered, mean", "median", "off by, mean", "at least 90%"):
            table.add_column(column, justify="left" if column == "heads chosen by" else "right")
        for way, meaning in WAYS.items():
            values = one.by_way[way]
            enough = sum(value >= 0.9 for value in values) / len(values)
            numbers = (one.mean(way), statistics.median(values), one.off(way))
            table.add_row(meaning, *(f"{number:.2f}" for number in numbers), f"{enough:.0%}")
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
