"""`python -m tests.circuits.methods`: how often the largest path is the right one, by method, where that is known.

1. Models compiled by hand, channels permuted and the stream rotated, with distractors: is the largest head the right
   (layer, channel) at the right source of the scan, and does the largest path to an embedding end at the right one?
2. The trained models of demos/localisation: does that path end at the answer's token, and is this token the one that
   adds most over all paths?

3. An echo without distractors, its block read by a MambaCoder made by hand: the right node is the answer's latent.

Methods: exact, the published preset, and the exact method with one published choice each. Of these acts and nodes act
through coders alone. A path below a millionth of the target names nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from circuits import FrozenModel, Logit, PathOptions, Trace, attribute, trace_paths
from circuits.graph import Node
from circuits.published import EXACT, optioned
from demos.localisation.stats import Rate
from demos.localisation.study import correct_prompts, load
from tests.circuits.compiled_models import (
    Case,
    Compiled,
    echo,
    echo_cases,
    echo_coder,
    induction,
    induction_cases,
    latch,
    latch_cases,
)

PRESET = PathOptions.of("mambacoder")
METHODS: dict[str, PathOptions] = {
    "exact": EXACT,
    "preset": PRESET,
    **PRESET.single(),
}
SEEDS = range(1000, 1010)
CASES = 10
PROMPTS = 256
MARK = "<!-- tests.circuits.methods -->"

FULL = {"distractors": True, "turned": True}


@dataclass(frozen=True)
class Task:
    """Models and prompts whose largest path is known."""

    model: Callable[[str, int], Compiled]
    cases: Callable[[int, int], list[Case]]
    held_back: bool = False
    """Whether the other candidate's lead is asked for, which is negative."""
    coded: bool = False
    """Whether a coder stands for the block."""


TASKS = {
    "latch, value through the convolution": Task(
        lambda family, seed: latch(family, "value", seed, **FULL), lambda n, seed: latch_cases(n, "value", seed)
    ),
    "latch, marker through the convolution": Task(
        lambda family, seed: latch(family, "marker", seed, **FULL), lambda n, seed: latch_cases(n, "marker", seed)
    ),
    "the same, what holds the other value back": Task(
        lambda family, seed: latch(family, "marker", seed, **FULL),
        lambda n, seed: latch_cases(n, "marker", seed),
        held_back=True,
    ),
    "induction": Task(lambda family, seed: induction(family, seed, **FULL), induction_cases),
    "echo through the scan": Task(lambda family, seed: echo(family, "scan", seed), echo_cases),
    "echo through D": Task(lambda family, seed: echo(family, "skip", seed), echo_cases),
    "echo, by a coder": Task(lambda family, seed: echo(family, "skip", seed, False), echo_cases, coded=True),
}


def largest(trace: Trace, options: PathOptions, kind: str | None = None) -> Node | None:
    """Where the largest path of one edge ends, or with `kind` the largest of all lengths that ends at such a node.

    None if it is next to nothing.
    """
    found = [path for paths in trace.paths for path in paths if path.nodes[-1].kind == kind] if kind else trace.paths[0]
    signed = options.rank == "signed"
    best = max(found, key=lambda path: path.weight if signed else abs(path.weight), default=None)
    return None if best is None or abs(best.weight) < 1e-6 * abs(trace.value) else best.nodes[-1]


def judge(task: Task, compiled: Compiled, case: Case, options: PathOptions) -> tuple[bool, bool, bool]:
    """Whether the source, the channel (or latent) and the embedding are right."""
    frozen = FrozenModel(compiled.model, case.tokens, [echo_coder(compiled.model)] if task.coded else [])
    target = Logit(case.answer, minus=case.other)
    if task.held_back:
        target = Logit(case.other, minus=case.answer)
    found = trace_paths(frozen, target, length=compiled.model.cfg.n_layers + 1, preset=options)
    node, end = largest(found, options), largest(found, options, "embed")
    kind, index = ("feature", case.answer) if task.coded else ("head", compiled.channel_of[case.answer])
    of_kind = node is not None and node.kind == kind
    return (
        of_kind and node.position == case.scan_at,
        of_kind and (node.layer, node.index) == (compiled.model.cfg.n_layers - 1, index),
        end is not None and end.position == case.value_at,
    )


def compiled_rates(
    task: Task, family: str, seeds: range, cases: int, methods: Iterable[str] = METHODS
) -> dict[str, tuple[Rate, Rate, Rate]]:
    """Method -> how often source, channel and embedding are right."""
    hits = {name: [0, 0, 0] for name in methods}
    for seed in seeds:
        compiled = task.model(family, seed)
        for case in task.cases(cases, seed):
            for name in hits:
                right = judge(task, compiled, case, METHODS[name])
                hits[name] = [n + one for n, one in zip(hits[name], right, strict=True)]
    total = len(seeds) * cases
    return {name: (Rate(a, total), Rate(b, total), Rate(c, total)) for name, (a, b, c) in hits.items()}


def trained_rates(task: str, n: int, seed: int) -> dict[str, tuple[Rate, Rate]]:
    """Method -> how often the answer's token ends the largest path to an embedding, and adds most over all paths."""
    model, kind = load(task)
    prompts, _ = correct_prompts(model, kind, n, seed)
    frozen = FrozenModel(model, prompts.tokens)
    target = Logit(tuple(prompts.answers.tolist()))
    found = {}
    for name, options in tqdm(METHODS.items(), desc=task, disable=not sys.stderr.isatty()):
        hits = 0
        for row, where in enumerate(prompts.where.tolist()):
            trace = trace_paths(frozen, target, length=model.cfg.n_layers + 1, row=row, preset=options)
            end = largest(trace, options, "embed")
            hits += end is not None and end.position == where
        by_token = attribute(optioned(frozen, options), targets=target, keep_heads=False).embeddings
        found[name] = Rate(hits, n), Rate(int((by_token.argmax(1) == prompts.where).sum()), n)
    return found


def tables(seeds: range = SEEDS, cases: int = CASES, prompts: int = PROMPTS) -> Iterator[str]:
    """Lines of markdown."""
    families = {"mamba": "Mamba-1", "mamba2": "Mamba-2"}
    for family, name_of_family in families.items():
        found = [compiled_rates(task, family, seeds, cases) for task in TASKS.values()]
        yield f"| {name_of_family} | {' | '.join(TASKS)} |"
        yield "|---|" + "---|" * len(TASKS)
        for name in METHODS:
            yield f"| {title(name)} | {' | '.join(cell(rates[name]) for rates in found)} |"
        yield ""
    trained = {task: trained_rates(task, prompts, seed=1000) for task in ("recall", "induction")}
    columns = [f"{task}, {what}" for task in trained for what in ("largest path", "all paths")]
    yield f"| trained models | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    for name in METHODS:
        if name not in ("acts", "nodes"):  # there is no coder
            yield f"| {title(name)} | {' | '.join(str(rate) for task in trained for rate in trained[task][name])} |"


def cell(rates: Iterable[Rate]) -> str:
    """Percents; one number if all are the same."""
    percents = [f"{100 * rate.value:.0f}" for rate in rates]
    return percents[0] if len(set(percents)) == 1 else " / ".join(percents)


def title(name: str) -> str:
    """A method as the table calls it."""
    return {"exact": "exact", "preset": '`preset="mambacoder"`'}.get(name, f"`{name}={getattr(PRESET, name, None)!r}`")


def main(argv: list[str] | None = None) -> None:
    """Print the tables, and with --write put them into the document."""
    parser = argparse.ArgumentParser(prog="python -m tests.circuits.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/circuit-methods.md")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = "\n".join(tables())
    print(text)
    if asked.write:
        page = Path("docs/circuit-methods.md")
        before, _, behind = page.read_text(encoding="utf-8").split(MARK)
        page.write_text(f"{before}{MARK}\n{text}\n{MARK}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
