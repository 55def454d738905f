"""One position of Mamba-2's scan: the case of generation, few operations and nothing saved that is not needed.

The in-place operations touch fresh tensors that no backward needs, so autograd may run through them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.precision import to_state_dtype


def ssd_step(
    x: Float[Tensor, "b 1 H P"],
    dt: Float[Tensor, "b 1 H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b 1 G N"],
    C: Float[Tensor, "b 1 G N"],
    D: Float[Tensor, " H"] | None,
    h0: Float[Tensor, "b H P N"] | None,
    want_states: bool,
) -> ScanOut:
    """One step of the Mamba-2 recurrence (Dao & Gu 2024, equation 16 with a scalar A per head)."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    b, _, H, P = x.shape
    G, N = B.shape[2:]
    u = (dt.unsqueeze(-1) * x).view(b, G, -1, 1)
    h = (u * B.transpose(1, 2)).view(b, H, P, N)
    if h0 is not None:
        h.addcmul_((dt[:, 0] * A).exp_()[..., None, None], h0)
    y = torch.matmul(h.view(b, G, -1, N), C.view(b, G, N, 1)).view(b, 1, H, P)
    if D is not None:
        y = torch.addcmul(y, D.unsqueeze(-1), x)
    return ScanOut(y.to(dtype), h, h.unsqueeze(1) if want_states else None)
