"""One position of the selective scan: the case of generation, few operations and nothing saved that is not needed.

The in-place operations touch fresh tensors that no backward needs, so autograd may run through them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.precision import to_state_dtype


def selective_step(
    x: Float[Tensor, "b 1 E"],
    dt: Float[Tensor, "b 1 E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b 1 N"],
    C: Float[Tensor, "b 1 N"],
    D: Float[Tensor, " E"] | None,
    h0: Float[Tensor, "b E N"] | None,
    want_states: bool,
) -> ScanOut:
    """One step of the Mamba-1 recurrence (Gu & Dao 2023, equation 2a-2b with zero-order hold of A)."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    x1, dt1 = x[:, 0], dt[:, 0]
    h = (dt1 * x1).unsqueeze(-1) * B
    if h0 is not None:
        # exp2 as in the scan: faster than exp, and the same state comes out of both.
        h.addcmul_((dt1.unsqueeze(-1) * (A * math.log2(math.e))).exp2_(), h0)
    y = torch.bmm(h, C.transpose(1, 2)).transpose(1, 2)
    if D is not None:
        y = torch.addcmul(y, D, x)
    return ScanOut(y.to(dtype), h, h.unsqueeze(1) if want_states else None)
