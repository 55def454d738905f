"""How long a write lasts, when the gates of the memory open, and how far back an output looks.

The state after position t still holds prod_{j=s+1..t} A_bar_j = exp(A (cs_t - cs_s)) of what position s wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.display import Shown
from hooked_mamba.hooks.positions import PosSlice


@torch.no_grad()
def write_survival(cache: ActivationCache, layer: int, source: int, per_state: bool = False) -> Float[Tensor, "..."]:
    """The share of the write at `source` that is left after each later position.

    Returns
    -------
    Tensor
        batch, position, channel (Mamba-2: head); with `per_state` also the N states (one number per head in Mamba-2);
        otherwise their mean. 1 at the source, 0 before it. In Mamba-3, whose writes enter in two halves, the share of
        both: at the source, that of the first half. For delta rules, the remaining length of the key.
    """
    view = cache.scan_view(layer)
    cache.selected(source, "source")
    s = _position(source, view.length)
    left = view.transport(s)
    left = left if per_state else left.mean(-1)
    return left if cache.has_batch_dim else left[0]


@torch.no_grad()
def half_life(cache: ActivationCache, layer: int) -> Float[Tensor, "..."]:
    """Positions until half of a write is gone, at the mean step size of each row: batch, channel or head, state.

    ln 2 / (mean dt |A|); in Mamba-2 the last axis has one number, since all states of a head decay alike. Padding is
    left out.

    Raises
    ------
    ValueError
        The mixer has no step size dt.
    """
    view = cache.step_scan(layer)
    real = (view.dt > 0).any(-1, keepdim=True).to(view.dt.dtype)
    mean = view.dt.sum(1) / real.sum(1).clamp(min=1)
    lives = torch.log(torch.tensor(2.0, dtype=mean.dtype)) / (mean.unsqueeze(-1) * -view.A)
    return lives if cache.has_batch_dim else lives[0]


@dataclass(frozen=True)
class Saliency(Shown):
    """How open each position's gates are; batch, position."""

    dt: Float[Tensor, "..."]
    """Mean step size over channels or heads: how much the position writes and makes forget."""
    B: Float[Tensor, "..."]
    """Length of B: how strongly the position writes."""
    C: Float[Tensor, "..."]
    """Length of C: how strongly the position reads."""
    write: Float[Tensor, "..."]
    """Mean length of dt B u over channels: what really enters the state."""


@torch.no_grad()
def saliency(cache: ActivationCache, layer: int) -> Saliency:
    """dt, B, C and the write of each position.

    Raises
    ------
    ValueError
        The mixer has no step size dt.
    """
    view = cache.step_scan(layer)
    length_B = view.B.norm(dim=-1)  # b l G
    per_lane = length_B.repeat_interleave(view.n_lanes // length_B.shape[-1], -1)
    write = (view.dt * per_lane).unsqueeze(-1) * view.u.abs()
    parts = (view.dt.mean(-1), length_B.mean(-1), view.C.norm(dim=-1).mean(-1), write.flatten(2).mean(-1))
    return Saliency(*(part if cache.has_batch_dim else part[0] for part in parts))


@dataclass(frozen=True)
class ReceptiveField(Shown):
    """How far back targets look; batch, target, channel or head."""

    mean_distance: Float[Tensor, "..."]
    """Distance to the source, weighted with |alpha[t,s]| (or what flows)."""
    reach: Float[Tensor, "..."]
    """The smallest distance within which `mass` of all weight lies."""


@torch.no_grad()
def receptive_field(
    cache: ActivationCache,
    layer: int,
    queries: PosSlice = None,
    mass: float = 0.9,
    flow: bool = False,
    include_skip: bool = False,
) -> ReceptiveField:
    """Effective receptive field of each channel or head.

    Parameters
    ----------
    queries
        Targets; an int drops the axis.
    mass
        Share of the weight within the reach.
    flow
        Weight by |alpha[t,s] u_s| instead of |alpha[t,s]|.
    include_skip
        Whether D counts at distance 0.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be above 0 and at most 1, got {mass}")
    view, select = cache.scan_view(layer), cache.selected(queries, "queries")
    index = select.index(view.length)
    at = list(range(view.length)) if isinstance(index, slice) else index
    step = max(1, 2**22 // (view.batch * len(at) * view.length))  # lanes at once
    device = view.u.device
    target = torch.tensor(at, device=device)
    distance = (target[:, None] - torch.arange(view.length, device=device)).clamp(min=0).to(view.dtype)
    means, reaches = [], []
    for first in range(0, view.n_lanes, step):
        lanes = slice(first, first + step)
        weight = view.rows(at, lanes=lanes, include_skip=include_skip).abs()
        if flow:
            weight = weight * view.u[:, :, lanes].abs().mean(-1).transpose(1, 2).unsqueeze(2).to(weight.dtype)
        total = weight.sum(-1).clamp(min=torch.finfo(weight.dtype).tiny)
        means.append((weight * distance).sum(-1) / total)
        # From the target backwards: the first distance at which enough has come together. Sources after it weigh 0.
        gathered = weight.flip(-1).cumsum(-1) / total.unsqueeze(-1)
        short = (gathered < mass * (1 - 1e-6)).sum(-1)
        after = view.length - 1 - target
        reaches.append((short - after).clamp(min=0).to(weight.dtype))
    fields = [torch.cat(v, 1).transpose(1, 2) for v in (means, reaches)]
    fields = [v if select.keeps_axis else v[:, 0] for v in fields]
    return ReceptiveField(*(v if cache.has_batch_dim else v[0] for v in fields))


def _position(t: int, length: int) -> int:
    if not -length <= t < length:
        raise IndexError(f"position {t} is out of range for {length} positions")
    return t % length


def layer_half_lives(cache: ActivationCache) -> Float[Tensor, "layer ..."]:
    """:func:`half_life` of every layer, stacked in front."""
    model: Any = cache.model
    return torch.stack([half_life(cache, i) for i in range(model.cfg.n_layers)])
