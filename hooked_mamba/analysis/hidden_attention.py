"""Hidden attention over layers: maps to plot, and their rollout.

The rows themselves are the cache's: `cache.hidden_attention(layer, channels, queries, average)`.
Ali, Zimerman & Wolf 2024, arXiv:2403.01590.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.captured import layer_list
from hooked_mamba.hooks.positions import PosSlice

Measure = Literal["mean", "abs", "flow"]
"""Of a layer's channels: the signed mean of alpha; the mean of |alpha|; or the mean of |alpha[t,s] u_s|, what flows."""


@torch.no_grad()
def attention_map(
    cache: ActivationCache,
    layer: int,
    measure: Measure = "abs",
    queries: PosSlice = None,
    branch: str | None = None,
) -> Float[Tensor, "... source"]:
    """One layer's hidden attention, or attention's own pattern, as one map: batch, target, source.

    Only the map takes memory: channels are processed a few at a time. `branch` is "mixer" or "attn"; None: the
    mixer where the block has one, else attention.
    """
    if measure not in ("mean", "abs", "flow"):
        raise ValueError(f"measure must be 'mean', 'abs' or 'flow', got {measure!r}")
    if measure == "mean":
        return cache.hidden_attention(layer, queries=queries, average=True, branch=branch)
    view, select = cache.scan_view(layer, branch), cache.selected(queries, "queries")
    index = select.index(view.length)
    at = list(range(view.length)) if isinstance(index, slice) else index
    b = view.batch
    total = view.values.new_zeros(b, len(at), view.length, dtype=view.dtype)
    step = max(1, 2**22 // (b * len(at) * view.length))  # lanes at once
    for first in range(0, view.n_lanes, step):
        lanes = slice(first, first + step)
        rows = view.rows(at, lanes=lanes).abs()
        if measure == "flow":
            rows = rows * view.u[:, :, lanes].abs().mean(-1).transpose(1, 2).unsqueeze(2).to(rows.dtype)
        total += rows.sum(1)
    total /= view.n_lanes
    total = total if select.keeps_axis else total[:, 0]
    return total if cache.has_batch_dim else total[0]


@torch.no_grad()
def attention_rollout(
    cache: ActivationCache,
    layers: Iterable[int] | None = None,
    measure: Measure = "abs",
    queries: PosSlice = None,
    residual: float = 0.5,
) -> Float[Tensor, "... source"]:
    """Which tokens reach which positions through several layers: the product of the layers' maps.

    Each map's rows are made to sum to 1 and mixed with the identity, (1 - residual) map + residual I, and the product
    is taken from the last layer down (Abnar & Zuidema 2020, arXiv:2005.00928).

    Parameters
    ----------
    layers
        None: all that move values between positions. If a block has a mixer and attention side by side, their rows are
        averaged.
    measure
        "abs" or "flow"; the rows of signed means cannot be normalised to sum to 1.
    queries
        Targets in the last layer; an int drops the axis.
    residual
        The share of the residual stream.
    """
    if measure not in ("abs", "flow"):
        raise ValueError(f"a rollout needs weights that are not negative: measure 'abs' or 'flow', got {measure!r}")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must be from 0 to 1, got {residual}")
    model: Any = cache.model
    chosen = [i for i in layer_list(model, layers) if layers is not None or moving_branches(model, i)]
    result: Tensor | None = None
    for i in reversed(chosen):
        names: list[str | None] = [*moving_branches(model, i)] or [None]  # None: attention_map says what is wrong
        rows = torch.stack([_normalized(attention_map(cache, i, measure, branch=name)) for name in names]).mean(0)
        rows = (1 - residual) * rows + residual * torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        if result is None:
            rows = rows if cache.has_batch_dim else rows[None]
            select = cache.selected(queries, "queries")
            index = select.index(rows.shape[1])
            result = rows if isinstance(index, slice) else rows[:, index]
        else:
            result = result @ rows
    if result is None:
        raise ValueError("there are no layers to roll out")
    result = result if select.keeps_axis else result[:, 0]
    return result if cache.has_batch_dim else result[0]


def _normalized(rows: Tensor) -> Tensor:
    """Rows normalised to sum to 1; those without any weight (padding) attend to themselves."""
    total = rows.sum(-1, keepdim=True)
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return torch.where(total > 0, rows / total.clamp(min=torch.finfo(rows.dtype).tiny), eye)


def moving_branches(model: Any, layer: int) -> list[str]:
    """The branches of a block that move values between positions and write into the stream."""
    block = model.block(layer)
    return [name for name, branch in block.branches.items() if name in block.written and branch.moves_values]


def all_layers(cache: ActivationCache, measure: Measure = "abs", queries: PosSlice = None) -> Tensor:
    """:func:`attention_map` of every layer that moves values between positions, stacked in front."""
    model: Any = cache.model
    chosen = [i for i in range(model.cfg.n_layers) if moving_branches(model, i)]
    return torch.stack([attention_map(cache, i, measure, queries) for i in chosen])
