"""The equations as a loop over positions: the oracle that every other backend is held against.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t     (Dao & Gu 2024, section 6, one A per head)
    y_t = C_t h_t + D x_t                        (equation 2b of Gu & Dao 2023)

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


@backend("ssd", takes={"h0", "states", "grad", "edits"})
def ssd(
    x: Float[Tensor, "b l H P"],
    dt: Float[Tensor, "b l H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    D: Float[Tensor, " H"] | None,
    *,
    h0: Float[Tensor, "b H P N"] | None,
    positions: tuple[int, ...] | None,
    chunk: int = 64,
    edits: StateEdits | None = None,
) -> ScanOut:
    """Mamba-2: a head has P x N states and one A; H/G heads share B and C. `chunk` changes nothing here."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    b, l, H, P = x.shape
    per_group = H // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    h = x.new_zeros(b, H, P, B.shape[3]) if h0 is None else h0
    ys, states = [], []
    for t in range(l):
        A_bar = torch.exp(dt[:, t] * A)[..., None, None]
        h = A_bar * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        if edits is not None and t in edits.at:
            h = edited(h, edits, edits.at.index(t))
        ys.append((h * C[:, t, :, None, :]).sum(-1))
        if positions is not None and t in positions:
            states.append(h)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D[:, None] * x
    return ScanOut(y.to(dtype), h, torch.stack(states, 1) if positions is not None else None)
