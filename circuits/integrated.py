"""Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): effects in the real model, nothing held.

Of embeddings, from a baseline to the prompt; and of nodes, from everything ablated to everything kept: what a circuit
loses without a head or a feature, whether by its value, by what it selects, or by what it gates. Both sum to the
distance between the two ends, up to the steps of the integral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.frozen_model import FrozenModel, frozen_of
from circuits.keep import Keep, only
from circuits.targets import Logit, Metric, chosen_targets
from hooked_mamba.frozen.places import Part
from hooked_mamba.models import HookedModel


def gauss_legendre(steps: int) -> list[tuple[float, float]]:
    """Points between 0 and 1, and their weights, which sum to 1."""
    if steps < 1:
        raise ValueError(f"an integral needs at least one step, got {steps}")
    points, weights = np.polynomial.legendre.leggauss(steps)
    return [((float(x) + 1) / 2, float(w) / 2) for x, w in zip(points, weights, strict=True)]


@dataclass(frozen=True)
class IntegratedGradients:
    """Contribution of each token to targets. n = targets x rows, all rows of a target together."""

    labels: list[str]
    target: Float[Tensor, " n"]
    """The numbers as the run had them."""
    start: Float[Tensor, " n"]
    """What they are at the baseline."""
    embeddings: Float[Tensor, "n l"]

    @property
    def residual(self) -> Float[Tensor, " n"]:
        """target - start - sum: the steps' error."""
        return self.target - self.start - self.embeddings.sum(1)


def integrated_gradients(
    model: HookedModel | FrozenModel,
    prompt: str | Sequence[Any] | Tensor | None = None,
    targets: Logit | Sequence[Logit] = (),
    *,
    baseline: Float[Tensor, " d"] | None = None,
    steps: int = 32,
) -> IntegratedGradients:
    """Attribute logits to the tokens' embeddings, with selection, gates and norms included.

    Many steps are needed where a norm on the way has little to divide by, as those of Falcon-Mamba over few states.

    Parameters
    ----------
    model, prompt
        A model and a batch of prompts, or a FrozenModel alone.
    targets
        Logits or leads.
    baseline
        The embedding where integration starts, at every real position; None: the mean of all.
    steps
        Points of the integral (Gauss-Legendre).

    Raises
    ------
    ValueError
        Targets that are no logits, or none; no prompt; a baseline of another size; fewer than one step.
    """
    frozen, several = frozen_of(model, prompt), chosen_targets(targets)
    chosen = [target for target in several if isinstance(target, Logit)]
    if len(chosen) < len(several):
        raise ValueError(f"targets must be a Logit or several, got {several}")
    d = frozen.model.cfg.d_model
    if baseline is not None and baseline.shape != (d,):
        raise ValueError(f"the baseline must be an embedding [{d}], got {list(baseline.shape)}")
    embed = frozen.cache["hook_embed"].detach()
    origin = frozen.model.embed.weight.detach().mean(0) if baseline is None else baseline.to(embed.dtype)
    way = embed - origin
    found = embed.new_zeros(len(chosen), *embed.shape[:2])
    for point, weight in gauss_legendre(steps):
        _, gradients = _embedding_gradients(frozen, chosen, origin + point * way)
        found += weight * (gradients * way).sum(-1)
    start, _ = _embedding_gradients(frozen, chosen, origin.expand_as(embed))
    target = torch.stack([_read(frozen, one, frozen.logits) for one in chosen])
    labels = [one.label for one in chosen for _ in range(frozen.batch)]
    return IntegratedGradients(labels, target.flatten(), start.flatten(), found.flatten(0, 1))


def _read(frozen: FrozenModel, target: Logit, logits: Float[Tensor, "b l V"]) -> Float[Tensor, " b"]:
    at = frozen.columns(target.position)
    return torch.stack([target.of(logits[row, at[row]], frozen, row) for row in range(frozen.batch)])


def _embedding_gradients(
    frozen: FrozenModel, targets: list[Logit], embed: Float[Tensor, "b l d"]
) -> tuple[Float[Tensor, "m b"], Float[Tensor, "m b l d"]]:
    """Targets of the model run from other embeddings, and their gradients."""
    leaf = embed.detach().clone().requires_grad_()
    mask = None if frozen.mask is None else frozen.mask.long()
    state = frozen.before if mask is None else None
    with torch.enable_grad(), frozen.model.hooks([("hook_embed", lambda x, hook: leaf)]):
        logits = frozen.model(frozen.tokens, attention_mask=mask, initial_state=state)
        values = [_read(frozen, target, logits) for target in targets]
        gradients = [torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for value in values]
    return torch.stack(values).detach(), torch.stack(gradients)


@dataclass(frozen=True)
class NodeEffects:
    """What keeping each node does to a metric, in the real model."""

    heads: dict[Part, Float[Tensor, "l U"]]
    """Part -> at each (source, unit): channel, attention head, neuron, expert."""
    features: dict[Part, Float[Tensor, "l F"]]
    """Part -> at each (position, feature)."""
    errors: dict[Part, Float[Tensor, " l"]]
    """Part -> what the coder misses, at each position."""
    whole: float
    """The metric with everything kept."""
    none: float
    """With everything ablated."""

    @property
    def residual(self) -> float:
        """whole - none - the sum of all effects: the steps' error."""
        parts = [*self.heads.values(), *self.features.values(), *self.errors.values()]
        return self.whole - self.none - sum(float(part.sum()) for part in parts)

    def largest(self, count: int) -> Keep:
        """The heads and features with the largest effects, whatever their sign; errors are never among them."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        sizes = torch.cat([part.abs().flatten() for part in (*self.heads.values(), *self.features.values())])
        best = torch.zeros_like(sizes, dtype=torch.bool)
        best[sizes.topk(min(count, int((sizes > 0).sum()))).indices] = True
        return Keep(self.heads, self.features, self.errors).where(best)


def node_effects(
    frozen: FrozenModel, metric: Metric, *, reference: FrozenModel | None = None, steps: int = 8
) -> NodeEffects:
    """Integrated gradients of all nodes at once, along the straight path from ablated to kept.

    Parameters
    ----------
    frozen
        A run of one prompt, with the coders that it is read through.
    metric
        What the circuit should produce.
    reference
        A run of as many positions whose mean stands in for what is ablated; None: zero.
    steps
        Points of the integral: one forward and backward pass each.

    Raises
    ------
    ValueError
        More than one prompt, fewer than one step, or what :func:`circuits.keep.only` refuses.
    """
    if frozen.batch != 1:
        raise ValueError(f"expected one prompt, got {frozen.batch}: call once for each")
    start = Keep.nothing(frozen)
    kinds = (start.heads, start.features, start.errors)
    places = [(kind, layer) for kind, part in enumerate(kinds) for layer in part]
    sums = [torch.zeros_like(kinds[kind][layer], dtype=frozen.dtype) for kind, layer in places]

    def by_kind(values: list[Tensor]) -> Keep:
        parts: tuple[dict[Part, Tensor], ...] = ({}, {}, {})
        for (kind, layer), value in zip(places, values, strict=True):
            parts[kind][layer] = value
        return Keep(*parts)

    def run(masks: list[Tensor]) -> Tensor:
        with only(frozen, by_kind(masks), reference) as model:
            return metric(model(frozen.tokens))[0]

    for point, weight in gauss_legendre(steps):
        masks = [torch.full_like(total, point, requires_grad=True) for total in sums]
        with torch.enable_grad():
            gradients = torch.autograd.grad(run(masks), masks)
        for total, gradient in zip(sums, gradients, strict=True):
            total += weight * gradient
    with torch.no_grad():
        none = float(run([torch.zeros_like(total) for total in sums]))
        whole = float(metric(frozen.logits)[0])
    found = by_kind(sums)
    return NodeEffects(found.heads, found.features, found.errors, whole, none)
