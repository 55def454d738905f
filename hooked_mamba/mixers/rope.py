"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split: pairs are (i, i + r/2)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(x: Float[Tensor, "b l h c"], positions: Int[Tensor, "b l"], width: int, base: float) -> Tensor:
    """Turn the first `width` numbers of every head by its position; the others stay.

    Angles are float32 as in the published codes, or float64 for float64 inputs.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The exponents are float32 in the published codes, whatever the model's dtype.
    inv_freq = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=x.device) / width)
    angle = positions[:, :, None, None].to(wide) * inv_freq.to(wide)
    cos, sin = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
    a, b = x[..., : width // 2], x[..., width // 2 : width]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., width:]], -1)
