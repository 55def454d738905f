"""What can be taken out of a hybrid, one thing at a time, as hooks on its sites.

head h of attention       z[:, :, h] = 0: nothing of its values is written
the state                 A_bar = 0: every position forgets all before it; the convolution still sees its taps
expert e, silenced        its weight is 0 where it was chosen; the other keeps its own
expert e, forbidden       its score is -inf: the router takes the next best
a whole branch            what it adds to the stream is 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Hooks = list[tuple[str, Callable[[Tensor, Any], Tensor]]]

TITLES = {"mixer": "Mamba-2", "attn": "attention", "moe": "all experts", "mlp": "the MLP"}


@dataclass(frozen=True)
class Knockout:
    """One intervention."""

    block: int
    what: str
    hooks: Hooks
    kind: str
    """The branch that it is about."""

    @property
    def title(self) -> str:
        """For tables."""
        return f"block {self.block}: {self.what}"


def knockouts(model: Any) -> Iterator[Knockout]:
    """All of a hybrid's, block by block."""
    for i in range(model.cfg.n_layers):
        branches = model.block(i).branches
        if "mixer" in branches:
            yield Knockout(i, "the state", [(f"blocks.{i}.mixer.hook_A_bar", zero)], "mixer")
        if "attn" in branches:
            for h in range(branches["attn"].cfg.n_heads):
                yield Knockout(i, f"head {h}", [(f"blocks.{i}.attn.hook_z", without_head(h))], "attn")
        for name in branches:
            yield Knockout(i, TITLES[name], [(f"blocks.{i}.hook_{name}_out", zero)], name)
        if "moe" in branches:
            for e in range(branches["moe"].cfg.n_experts):
                yield Knockout(i, f"expert {e}, silenced", silenced(i, e), "moe")
                forbid = (f"blocks.{i}.moe.hook_router_scores", forbidden(e))
                yield Knockout(i, f"expert {e}, forbidden", [forbid], "moe")


def zero(value: Tensor, hook: Any) -> Tensor:
    """Nothing."""
    return torch.zeros_like(value)


def without_head(h: int) -> Callable[[Tensor, Any], Tensor]:
    """One head of b l Q c at 0."""

    def edit(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, h] = 0
        return z

    return edit


def silenced(layer: int, e: int) -> Hooks:
    """An expert's weight at 0 wherever it was chosen."""
    chosen: dict[str, Tensor] = {}

    def keep(indices: Tensor, hook: Any) -> Tensor:
        chosen["at"] = indices
        return indices

    def edit(weights: Tensor, hook: Any) -> Tensor:
        return weights.masked_fill(chosen["at"] == e, 0)

    place = f"blocks.{layer}.moe"
    return [(f"{place}.hook_expert_indices", keep), (f"{place}.hook_expert_weights", edit)]


def forbidden(e: int) -> Callable[[Tensor, Any], Tensor]:
    """An expert's score at -inf."""

    def edit(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[..., e] = -torch.inf
        return scores

    return edit
