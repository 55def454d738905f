"""Dropout without a dropout layer: hooks on sites, there while training and gone in evaluation."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def dropout_hooks(n_layers: int, rate: float, generator: torch.Generator) -> list[tuple[str, Any]]:
    """Forward hooks that drop entries of the embedding and of every mixer's output into the residual stream.

    Each entry is set to 0 with probability `rate`, the rest divided by 1 - rate (Srivastava et al. 2014).
    The masks come from `generator` alone, so that a checkpoint can keep its state.

    Returns
    -------
    list of (site name, hook), as `model.hooks(fwd_hooks=...)` takes them; empty if rate is 0.
    """
    if not rate:
        return []

    def drop(value: Float[Tensor, "b l d"], hook: Any) -> Float[Tensor, "b l d"]:
        keep = torch.empty_like(value).bernoulli_(1 - rate, generator=generator)
        return value * keep.div_(1 - rate)

    sites = ["hook_embed", *(f"blocks.{i}.mixer.hook_out_proj" for i in range(n_layers))]
    return [(site, drop) for site in sites]
