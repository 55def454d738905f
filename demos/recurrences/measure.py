"""What is measured of each recurrence. All positions count, nothing is chosen on the prompts that it is judged on.

1. Capacity: right answers by the number of pairs, up to twice as many as in training.
2. Duration: right answers when questions about other pairs come first.
3. What is left of a write after so many positions, beside the same model before training.
4. A key that comes again with another value: the new one, the old one, or something else?
5. What the removal at the new value does for its lead over the old one: its direct part, and in the real model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from demos.localisation.stats import Rate
from demos.recurrences.subjects import PAIRS, Rewritten, Subject, asked_late, recall, rewritten
from hooked_mamba import HookedModel
from hooked_mamba.analysis import write_survival
from hooked_mamba.analysis.erasure import Erasure, erasure
from hooked_mamba.frozen.delta import DeltaScan
from hooked_mamba.frozen.run import Run

PAIR_COUNTS = (2, 4, 6, 8, 10, 12, 14, 16)
WAITS = (0, 2, 4, 8, 16, 32, 64, 128)
"""Questions about other pairs before the one that counts; in training up to 7 come first."""
DISTANCES = (1, 2, 4, 8, 16, 32, 64)


def accuracy(model: HookedModel, tokens: Tensor, answers: Tensor) -> Rate:
    """How often the likeliest next token is the answer."""
    right = model(tokens)[:, -1].argmax(-1) == answers
    return Rate(int(right.sum()), len(answers))


def capacity(subject: Subject, n: int, seed: int) -> list[Rate]:
    """By number of pairs."""
    prompts = [recall(n, pairs, seed) for pairs in PAIR_COUNTS]
    return [accuracy(subject.model, one.tokens, one.answers) for one in prompts]


def duration(subject: Subject, n: int, seed: int) -> list[Rate]:
    """By questions that come first."""
    prompts = [asked_late(n, wait, seed) for wait in WAITS]
    return [accuracy(subject.model, one.tokens, one.answers) for one in prompts]


def survival(model: HookedModel, n: int, seed: int) -> Float[Tensor, "layer distance"]:
    """What part of a value's write is left after each distance: mean over prompts, the eight values, and lanes."""
    tokens = asked_late(n, DISTANCES[-1] // 2, seed).tokens
    _, cache = model.run_with_cache(tokens)
    found = torch.zeros(model.cfg.n_layers, len(DISTANCES))
    for layer in range(model.cfg.n_layers):
        for source in range(1, 2 * PAIRS, 2):
            left = write_survival(cache, layer, source)  # b l lane
            found[layer] += torch.stack([left[:, source + by].mean() for by in DISTANCES]) / PAIRS
    return found


def which_value(subject: Subject, n: int, seed: int) -> dict[str, Rate]:
    """What is answered where a key came twice."""
    prompts = rewritten(n, seed)
    said = subject.model(prompts.tokens)[:, -1].argmax(-1)
    new, old = int((said == prompts.new).sum()), int((said == prompts.old).sum())
    return {"new": Rate(new, n), "old": Rate(old, n), "other": Rate(n - new - old, n)}


# Removals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """What one removal of a layer, at the new value, does for the new value's lead over the old one; logits."""

    lead: float
    """The lead as it is."""
    direct: float
    """What its direct part changes by when that removal alone is switched off, by `erasure`; heads summed."""
    elsewhere: float
    """The same of the removal at any other position, on average: the control."""
    without: float
    """The lead of the real model in which that layer recalls nothing at the new value."""


def removal(subject: Subject, layer: int, n: int, seed: int) -> Removal:
    """Means over prompts in which a key comes twice."""
    prompts, rows = rewritten(n, seed), torch.arange(n)
    run = Run(subject.model, prompts.tokens)
    covector = _lead(run, prompts)
    heads = range(run.chain(layer).scan.n_lanes)
    effect = torch.stack([erasure(run, layer, head, covector).removal for head in heads]).sum(0)
    there = effect[rows, prompts.second]

    def nothing_there(recall: Tensor, hook: Any) -> Tensor:
        return recall.index_put((rows, prompts.second), recall.new_zeros(()))

    hooks = [(f"blocks.{layer}.mixer.hook_recall", nothing_there)]
    edited = subject.model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)

    def lead(logits: Tensor) -> float:
        return float((logits[rows, -1, prompts.new] - logits[rows, -1, prompts.old]).mean())

    elsewhere = (effect.sum(1) - there) / (effect.shape[1] - 1)
    return Removal(lead(run.logits), float(there.mean()), float(elsewhere.mean()), lead(edited))


def _lead(run: Run, prompts: Rewritten) -> Float[Tensor, "b l d"]:
    """The lead as a covector on the stream, at the last position."""
    direction = (run.unembedding[:, prompts.new] - run.unembedding[:, prompts.old]).t()
    covector = torch.zeros_like(run.resid(run.n_layers))
    rows = torch.arange(run.batch)
    covector[:, -1] = run.behind_norm(run.n_layers, direction, (rows, run.length - 1))
    return covector


def erasure_error(subject: Subject, layer: int, seed: int) -> float:
    """The largest difference, as a part of the largest effect, between `erasure` and doing each write, removal and
    decay of a layer without, one by one; in float64, of one prompt."""
    prompts = rewritten(1, seed)
    run = Run(subject.model.double(), prompts.tokens)
    covector, chain = _lead(run, prompts), run.chain(layer)
    scan = chain.scan
    assert isinstance(scan, DeltaScan)
    vy = chain.pull(covector, torch.zeros(1, dtype=torch.long), until="y").below.unflatten(2, (scan.n_lanes, -1))
    worst = largest = 0.0
    for head in range(scan.n_lanes):
        found: Erasure = erasure(run, layer, head, covector)
        one, seen = scan.chosen([head]), vy[:, :, [head]]
        usual = (one.out().y * seen).sum()
        for s in range(run.length):
            for what, changed in _without(one, s).items():
                done = float((changed.out().y * seen).sum() - usual)
                said = float(getattr(found, what)[0, s])
                worst, largest = max(worst, abs(done - said)), max(largest, abs(done))
    subject.model.float()
    return worst / largest


def _without(scan: DeltaScan, s: int) -> dict[str, DeltaScan]:
    """The scan with one thing at one position switched off."""

    def at(part: Tensor, value: float | Tensor) -> Tensor:
        part = part.clone()
        part[:, s] = value
        return part

    b = scan.b.expand_as(scan.k)
    kept = {"write": replace(scan, u=at(scan.u, 0)), "removal": replace(scan, b=at(b, 0))}
    undecayed = -scan.strength.unsqueeze(-1) * scan.k if scan.removes_decayed else b
    kept["decay"] = replace(scan, w=at(scan.w, 1), b=at(b, undecayed[:, s]))
    return kept
