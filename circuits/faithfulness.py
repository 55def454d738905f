"""Does the circuit do what the graph says? Four checks by intervention, with controls.

(a) on the frozen model, removing one node changes every other by its edge;
(b) with everything outside the circuit ablated (errors too), how much of the metric is recovered, beside random
    circuits and circuits by gradient times activation with as many nodes;
(c) turning the circuit's features up, beside features of like norm and frequency drawn at random;
(d) rank correlation of the embeddings' effects with activation patching of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import attribute
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from circuits.influence import total_effects
from circuits.keep import Keep, only
from circuits.push import frozen_changes
from circuits.targets import Metric, Target
from hooked_mamba.frozen.places import Part, site_of

TIE = 0.01
"""Shares nearer to each other than this count as equal."""

OVER = 0.1
"""A circuit that recovers more than the whole by this much is said to overshoot."""


@dataclass(frozen=True)
class Recovery:
    """Check (b)."""

    nodes: int
    """Features and heads that were kept."""
    circuit: float
    """Share of the metric's distance from ablated to whole model that the circuit recovers; 1: all."""
    gradient: float
    """The same for the nodes with the largest gradient times activation in the full model."""
    random: tuple[float, ...]
    """The same for nodes drawn at random among those that are active."""

    @property
    def verdict(self) -> str:
        """In plain words, whether the circuit recovers the metric better than as many nodes of the baselines."""
        over = f"; it overshoots by {self.circuit - 1:.0%}" if self.circuit > 1 + OVER else ""
        return self._beside_baselines() + over

    def _beside_baselines(self) -> str:
        mine, theirs = abs(1 - self.circuit), abs(1 - self.gradient)
        if self.random and mine >= min(abs(1 - share) for share in self.random):
            return "no better than random nodes"
        if abs(mine - theirs) < TIE:
            return "as good as gradient x activation"
        return "better than gradient x activation" if mine < theirs else "gradient x activation does better"


@dataclass(frozen=True)
class TurnedUp:
    """Check (c): each feature of the circuit that a path leads from to the target, at twice its activation."""

    predicted: float
    """Mean change of the metric, counted positive in the direction that the graph predicts."""
    right: float
    """Share of features that move the metric in this direction."""
    partners: float
    """Mean size of the change by features of like norm and frequency, drawn at random, turned up as much."""


@dataclass(frozen=True)
class Faithfulness:
    """The report."""

    edges: float | None
    """(a) The largest difference between an edge and the change that it predicts on the frozen model, over the edges
    of a hundred nodes; None where edges follow selection too, which no frozen model holds."""
    recovery: Recovery
    features: TurnedUp | None
    """(c); None without such features."""
    patching: float
    """(d) Spearman's rank correlation with patching; nan where either is constant."""

    def __str__(self) -> str:
        random = sum(self.recovery.random) / max(len(self.recovery.random), 1)
        frozen = "none: they follow selection" if self.edges is None else f"largest difference {self.edges:.1e}"
        lines = [
            f"(a) edges against removal on the frozen model: {frozen}",
            f"(b) {self.recovery.nodes} nodes recover {self.recovery.circuit:.0%} of the metric"
            f" (gradient x activation {self.recovery.gradient:.0%}, random {random:.0%}): {self.recovery.verdict}",
        ]
        if self.features is not None:
            up = self.features
            lines.append(
                f"(c) doubling a feature changes it by {up.predicted:+.3g} in the predicted direction on average, and"
                f" {up.right:.0%} of the features move it that way (random ones: {up.partners:.3g} either way)"
            )
        lines.append(f"(d) rank correlation with patching tokens: {self.patching:+.2f}")
        return "\n".join(lines)


def faithfulness(
    frozen: FrozenModel,
    whole: Graph,
    graph: Graph,
    targets: Target | Sequence[Any],
    metric: Metric,
    *,
    reference: FrozenModel | None = None,
    randoms: int = 5,
    seed: int = 0,
) -> Faithfulness:
    """All four checks.

    Parameters
    ----------
    frozen, whole, graph, targets
        A run, its graph as it was built and as it was pruned, and what it was built for.
    metric
        What the circuit should produce, such as a logit difference.
    reference
        Other prompts of the same length, whose means stand in for what is ablated, and whose tokens for patched ones;
        None: zeros, and each token replaced by the prompt's others in turn.
    randoms, seed
        How many random circuits, and their seed.
    """
    edges = None
    if frozen.rule.name == "none":
        ends = [i for i, node in enumerate(whole.nodes) if node.kind in ("embed", "error", "feature", "head")]
        ends = ends[:: max(1, len(ends) // 100)]
        changes = frozen_changes(frozen, whole, targets, ends)
        edges = float((changes + whole.weights[:, ends].t()).abs().max())
    return Faithfulness(
        edges,
        recovery(frozen, graph, metric, reference=reference, randoms=randoms, seed=seed),
        _turned_up(frozen, graph, metric, seed),
        _patching(frozen, targets, metric, reference),
    )


@torch.no_grad()
def recovery(
    frozen: FrozenModel,
    circuit: Graph | Keep,
    metric: Metric,
    *,
    reference: FrozenModel | None = None,
    randoms: int = 5,
    seed: int = 0,
) -> Recovery:
    """Check (b) alone, of a graph's features and heads, or of any choice of nodes."""

    def measure(keep: Keep) -> float:
        with only(frozen, keep, reference) as model:
            return float(metric(model(frozen.tokens))[0])

    whole, none = float(metric(frozen.logits)[0]), measure(Keep.nothing(frozen))
    if whole == none:
        raise ValueError("ablating everything leaves the metric unchanged, so there is nothing to recover")

    def share(keep: Keep) -> float:
        return (measure(keep) - none) / (whole - none)

    kept = circuit if isinstance(circuit, Keep) else Keep.of_graph(frozen, circuit)
    nodes = len(replace(kept, errors={}))  # the others are never given errors
    active = _sizes(frozen)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(active.shape, generator=generator).to(active.device) for _ in range(randoms)]
    drawn = [torch.where(active > 0, scores, -1) for scores in drawn]
    return Recovery(
        nodes,
        share(kept),
        share(_largest(frozen, _gradients(frozen, metric).abs(), nodes)),
        tuple(share(_largest(frozen, scores, nodes)) for scores in drawn),
    )


def _parts(frozen: FrozenModel) -> list[tuple[str, Part]]:
    """All candidates in the order of :meth:`Keep.where`: (kind, part)."""
    empty = Keep.nothing(frozen)
    return [("head", i) for i in empty.heads] + [("feature", i) for i in empty.features]


def _largest(frozen: FrozenModel, scores: Float[Tensor, " m"], count: int) -> Keep:
    """The nodes with the largest scores."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(min(count, len(scores))).indices] = True
    return Keep.nothing(frozen).where(mask)


def _sizes(frozen: FrozenModel) -> Float[Tensor, " m"]:
    """|u| (|p| in split layers) of units, and latents of features."""
    found = []
    for kind, layer in _parts(frozen):
        if kind == "feature":
            found.append(frozen.latents(layer)[0])
        else:
            values, chain = frozen.channel_values(layer)[0], frozen.chain(layer)
            one_row = torch.zeros(1, dtype=torch.long, device=values.device)
            found.append(values if chain.unit == 1 else chain.by_unit(values[None].square(), one_row)[0].sqrt())
    return torch.cat([part.abs().flatten() for part in found])


def _gradients(frozen: FrozenModel, metric: Metric) -> Float[Tensor, " m"]:
    """Gradient of the full model's metric times activation, selection and gates included."""
    model = frozen.model
    kept: dict[str, Tensor] = {}

    def watch(value: Tensor, hook: Any) -> Tensor:
        value = value if value.requires_grad else value.requires_grad_()
        kept[hook.name] = value
        return value

    def at(kind: str, part: Part) -> str:
        if kind == "feature":
            return site_of(model, part, frozen.coded[part].node)
        # A value that several heads share has one gradient; each head's own is that of what it mixes.
        return site_of(model, part, "y" if shared(part) else frozen.channels_at(part))

    def shared(part: Part) -> bool:
        chain = frozen.chain(part)
        return chain.mix is not None and chain.unit > 1

    names = dict.fromkeys(at(kind, part) for kind, part in _parts(frozen))
    with torch.enable_grad(), model.hooks([(name, watch) for name in names]):
        value = metric(model(frozen.tokens))[0]
        gradients = dict(
            zip(kept, torch.autograd.grad(value, list(kept.values()), materialize_grads=True), strict=True)
        )
    found = []
    for kind, layer in _parts(frozen):
        if kind == "feature":
            gradient = gradients[at(kind, layer)][0].flatten(1).to(frozen.dtype)
            found.append((gradient @ frozen.coded[layer].W_dec.to(frozen.dtype).t()) * frozen.latents(layer)[0])
        else:
            site, chain = at(kind, layer), frozen.chain(layer)
            one_row = torch.zeros(1, dtype=torch.long, device=frozen.tokens.device)
            if shared(layer):
                with torch.enable_grad():
                    at_values = chain.scan.pull(gradients[site].flatten(2))[0]
                effects = at_values * chain.u
            else:
                effects = (gradients[site] * kept[site].detach()).flatten(2)[..., : chain.width]
            found.append(chain.by_unit(effects, one_row)[0])
    return torch.cat([part.flatten() for part in found])


@torch.no_grad()
def _turned_up(frozen: FrozenModel, graph: Graph, metric: Metric, seed: int) -> TurnedUp | None:
    """Each feature of the circuit doubled where it is active, and a partner of like decoder norm and size instead."""
    signs = total_effects(graph).sign().tolist()
    predicted = [(node, sign) for node, sign in zip(graph.nodes, signs, strict=True) if node.kind == "feature" and sign]
    if not predicted:
        return None
    generator = torch.Generator().manual_seed(seed)
    base = float(metric(frozen.logits)[0])
    own: list[float] = []
    partners: list[float] = []
    for node, _ in predicted:
        coded = frozen.coded[node.part]
        norms = coded.W_dec.norm(dim=1)
        used = (frozen.latents(node.part)[0] != 0).sum(0)
        alike = (norms - norms[node.index]).abs() + (used - used[node.index]).abs()
        alike[node.index] = torch.inf
        nearest = alike.topk(min(10, len(alike) - 1), largest=False).indices
        partner = int(nearest[torch.randint(len(nearest), (1,), generator=generator)])
        for index, effects in ((node.index, own), (partner, partners)):
            change = node.activation * coded.W_dec[index]
            effects.append(_with_change(frozen, node.part, node.position, change, metric) - base)
    along = [effect * sign for effect, (_, sign) in zip(own, predicted, strict=True)]
    n = len(along)
    return TurnedUp(sum(along) / n, sum(x > 0 for x in along) / n, sum(map(abs, partners)) / n)


def _with_change(frozen: FrozenModel, part: Part, position: int, change: Tensor, metric: Metric) -> float:
    def add(value: Tensor, hook: Any) -> Tensor:
        value[:, position] += change.to(value.dtype).reshape(value.shape[2:])
        return value

    hooks = [(site_of(frozen.model, part, frozen.coded[part].node), add)]
    return float(metric(frozen.model.run_with_hooks(frozen.tokens, fwd_hooks=hooks))[0])


@torch.no_grad()
def _patching(
    frozen: FrozenModel, targets: Target | Sequence[Any], metric: Metric, reference: FrozenModel | None
) -> float:
    """Effect of each token's embedding by the graph's method, against replacing the token in the real model."""
    found = attribute(frozen, targets=targets, keep_heads=False)
    effects = found.embeddings[0]
    whole, l = float(metric(frozen.logits)[0]), frozen.length
    tokens = frozen.tokens[0]
    changes = []
    for t in range(l):
        others = reference.tokens[:, t] if reference is not None else tokens[tokens != tokens[t]]
        if len(others) == 0:
            changes.append(0.0)
            continue
        others = others[:8]
        rows = tokens.repeat(len(others), 1)
        rows[:, t] = others
        changes.append(whole - float(metric(frozen.model(rows)).mean()))
    return spearman(effects.double().cpu(), torch.tensor(changes, dtype=torch.float64))


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Rank correlation, ties with their mean rank; nan where one is constant."""

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
        return ((counts.cumsum(0) - counts) + (counts - 1) / 2)[inverse].double()

    stacked = torch.stack([ranks(a), ranks(b)])
    stacked = stacked - stacked.mean(1, keepdim=True)
    norms = stacked.norm(dim=1)
    return float(stacked[0] @ stacked[1] / (norms[0] * norms[1])) if bool((norms > 0).all()) else float("nan")
