"""The equations as a loop over positions: the oracle that every other backend is held against.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t     (Gu & Dao 2023, equation 2a, A by zero-order hold, B Euler)
    y_t = C_t h_t + D x_t                        (equation 2b)

Gradients come from autograd. Any device, any floating-point type, natively with edits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.precision import to_state_dtype
from hooked_mamba.ops.segments import edited


@backend("selective_scan", takes={"h0", "states", "grad", "edits"})
def selective_scan(
    x: Float[Tensor, "b l E"],
    dt: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"] | None,
    *,
    h0: Float[Tensor, "b E N"] | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits | None = None,
) -> ScanOut:
    """Mamba-1: every channel has N states and its own A."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    b, l, E = x.shape
    h = x.new_zeros(b, E, A.shape[1]) if h0 is None else h0
    ys, states = [], []
    for t in range(l):
        A_bar = torch.exp(dt[:, t, :, None] * A)
        B_bar = dt[:, t, :, None] * B[:, t, None, :]
        h = A_bar * h + B_bar * x[:, t, :, None]
        if edits is not None and t in edits.at:
            h = edited(h, edits, edits.at.index(t))
        ys.append((h * C[:, t, None, :]).sum(-1))
        if positions is not None and t in positions:
            states.append(h)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D * x
    return ScanOut(y.to(dtype), h, torch.stack(states, 1) if positions is not None else None)
