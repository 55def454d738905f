"""Dropout without a dropout layer: hooks on sites, there while training and gone in evaluation."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ADDED = re.compile(r"blocks\.\d+\.hook_(mixer|attn|moe|mlp)_out")


def dropout_hooks(model: Any, rate: float, generator: torch.Generator) -> list[tuple[str, Any]]:
    """Forward hooks that drop entries of the embedding and of what every block's branches add to the residual stream.

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

    return [(site, drop) for site in ("hook_embed", *added_sites(model))]


def added_sites(model: Any) -> list[str]:
    """The sites of what each branch adds to the stream, in the order of the forward pass."""
    branches = [name for name in model.hook_dict if ADDED.fullmatch(name)]
    return branches or [f"blocks.{i}.mixer.hook_out_proj" for i in range(model.cfg.n_layers)]
