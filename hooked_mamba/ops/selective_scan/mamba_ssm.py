"""Mamba-1 by the authors' own CUDA kernel (package mamba_ssm), as a backend to compare with; never chosen unasked.

It takes no initial state and no edits, and saves no states; its last state has no gradient: asking for one raises.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.mamba_ssm_limits import refusal


@backend("selective_scan", takes={"grad"}, refuses=refusal)
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
) -> ScanOut:
    """The scan of Mamba-1; see `hooked_mamba.ops.selective_scan`. dt is taken in the type of x."""
    if h0 is not None or positions is not None:
        raise ValueError("mamba_ssm's selective scan takes no initial state and saves none: edits need another backend")
    x, dt, B, C = (t.to(x.dtype).transpose(1, 2).contiguous() for t in (x, dt, B, C))
    y, h_last = selective_scan_fn(
        x, dt, A.float(), B, C, None if D is None else D.float(), delta_softplus=False, return_last_state=True
    )
    return ScanOut(y.transpose(1, 2), _NoGradient.apply(h_last, y) if y.requires_grad else h_last, None)


class _NoGradient(torch.autograd.Function):
    """The identity, which refuses to be differentiated rather than giving a wrong zero."""

    @staticmethod
    def forward(ctx, value: Tensor, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        if grad is not None:
            raise RuntimeError("mamba_ssm gives no gradient of the last state: use another backend")
        return None, None
