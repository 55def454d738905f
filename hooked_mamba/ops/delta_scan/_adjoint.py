"""The adjoint of the delta rule in v and h0, with the rest held: the same scan, run from the end.

L_t = L_{t+1} M_{t+1}^T + dy_t r_t^T,      M^T = diag(w) + b a^T,      dv_t = L_t k_t,      dh0 = L_0 M_0^T
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_the_end(r: Tensor, w: Tensor, k: Tensor, dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Arguments r, w, k, v, a, b of the scan that gives dv, last position first, for the gradient dy of y.

    Each step uses the transition of the position after it, and the first one none.
    """
    one, nothing = torch.ones_like(w[:, :1]), torch.zeros_like(a[:, :1])
    w, a, b = (torch.cat([t[:, 1:], last], 1) for t, last in ((w, one), (a, nothing), (b, nothing)))
    r, w, k, dy, a, b = (t.flip(1) for t in (r, w, k, dy, a, b))
    return k, w, r, dy, b, a


def before_the_first(g: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The gradient to h0 from the one to the state after the first position."""
    w, a, b = (t[:, 0].unsqueeze(-2).to(g.dtype) for t in (w, a, b))
    return g * w + (g * b).sum(-1, keepdim=True) * a
