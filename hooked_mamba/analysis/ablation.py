"""Ablation: replace the values at a site by zero, by their mean, or by the values on other inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.captured import Positions, padding_under_way, position_mask
from hooked_mamba.hooks.names import NamesFilter, match_names, split_state_point

Method = Literal["zero", "mean", "resample"]


@contextmanager
def ablate(
    model: Any,
    name: NamesFilter,
    method: Method = "zero",
    reference: ActivationCache | None = None,
    positions: Positions = None,
    units: int | Sequence[int] | None = None,
    mean_over: Literal["all", "batch"] = "all",
    seed: int = 0,
) -> Iterator[Any]:
    """Ablate sites in every forward pass inside the `with`.

    Parameters
    ----------
    name
        Which sites: a name, a glob, a list or a predicate; single states (`...hook_h.4`) too.
    method
        "zero"; "mean" of the reference; "resample": each row gets the value of one row of the reference, drawn with
        `seed` anew for every pass and the same for all sites of a pass.
    reference
        A cache that holds the sites, for "mean" and "resample". For "resample", and for means over the batch alone,
        of the same length.
    positions
        Columns: an int, several, or a mask b l of bools; None: all.
    units
        Channels or heads, an index of the axis behind the positions (of single states: behind the batch); None: all.
    mean_over
        "all": one mean for all positions. "batch": one for each position.

    Raises
    ------
    ValueError
        An unknown method, a missing reference, or one that does not fit.
    """
    if method not in ("zero", "mean", "resample"):
        raise ValueError(f"method must be 'zero', 'mean' or 'resample', got {method!r}")
    if mean_over not in ("all", "batch"):
        raise ValueError(f"mean_over must be 'all' or 'batch', got {mean_over!r}")
    if method != "zero" and reference is None:
        raise ValueError(f"method={method!r} needs reference=, a cache of the sites on other inputs")
    sites = match_names(name, list(model.hook_dict))
    rows: dict[int, Tensor] = {}

    def replacement(value: Tensor, site: str) -> Tensor:
        if method == "zero":
            return torch.zeros_like(value)
        assert reference is not None
        other = reference[site].to(value)
        if not reference.has_batch_dim:
            other = other[None]
        if method == "mean":
            over = 0 if mean_over == "batch" or split_state_point(site) else (0, 1)
            mean = other.mean(over, keepdim=True)
            if mean.shape[1] not in (1, value.shape[1]):
                raise ValueError(f"the reference has {mean.shape[1]} positions at {site}, this pass {value.shape[1]}")
            return mean.expand_as(value)
        if other.shape[1:] != value.shape[1:]:
            raise ValueError(f"the reference is {list(other.shape)} at {site}, this pass {list(value.shape)}")
        # The same draw at all sites of a pass, which the first of them makes.
        if site == sites[0] or value.shape[0] not in rows:
            rows[value.shape[0]] = torch.randint(len(other), (value.shape[0],), generator=generator)
        return other[rows[value.shape[0]].to(value.device)]

    def edit(value: Tensor, hook: Any) -> Tensor:
        state = split_state_point(hook.name) is not None
        new = replacement(value, hook.name)
        axis = 1 if state else 2
        if not state:
            b, l = value.shape[:2]
            mask = position_mask(positions, b, l, value.device, padded.padding).reshape(b, l, *(1,) * (value.ndim - 2))
        else:
            mask = torch.ones((1,) * value.ndim, dtype=torch.bool, device=value.device)
        if units is not None:
            chosen = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
            chosen[units if isinstance(units, int) else list(units)] = True
            mask = mask & chosen.reshape(-1, *(1,) * (value.ndim - axis - 1))
        return torch.where(mask, new, value)

    generator = torch.Generator().manual_seed(seed)
    with padding_under_way(model) as padded, model.hooks([(site, edit) for site in sites]):
        yield model
