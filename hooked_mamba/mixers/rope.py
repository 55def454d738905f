"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split: pairs are (i, i + r/2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.state import Call

Turn = tuple[Float[Tensor, "b l 1 r"], Float[Tensor, "b l 1 r"]]
"""Cosines and signed sines of the angles, those of a pair at both of its places, in the dtype of what they turn."""


def turn_of(call: Call, like: Float[Tensor, "b l h c"], width: int, base: float) -> Turn:
    """The angles of a call's positions, computed once for all layers of the pass.

    They are float32 as in the published codes, or float64 for float64 inputs.
    """
    key = (width, base, like.dtype, like.device)
    if key not in call.turns:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        # The exponents are float32 in the published codes, whatever the model's dtype.
        inv_freq = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width)
        positions = call.positions(like.shape[0], like.shape[1], like.device)
        angle = positions[:, :, None, None].to(wide) * inv_freq.to(wide)
        cos, sin = torch.cos(angle).to(like.dtype), torch.sin(angle).to(like.dtype)
        call.turns[key] = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return call.turns[key]


def rotate(x: Float[Tensor, "b l h c"], turn: Turn) -> Float[Tensor, "b l h c"]:
    """Rotate the first dimensions of every head by its position; the others stay."""
    cos, sin = turn
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    a, b = turned.chunk(2, -1)
    turned = torch.addcmul(turned * cos, torch.cat([b, a], -1), sin)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)
