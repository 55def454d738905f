"""The authors' own CUDA and Triton kernels (package mamba_ssm), as a backend to compare with; never chosen unasked.

They take no state edits and save no states; Mamba-1's takes no initial state either, and its last state has no
gradient: asking for one raises.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from hooked_mamba.ops.interface import ScanOut


def why_not(op: str, x: Tensor, N: int, asked: frozenset[str]) -> str | None:
    """Refuses what its kernels have no argument for."""
    if not x.is_cuda:
        return f"it needs a GPU, and x is on {x.device.type}"
    if x.dtype == torch.float64:
        return "it computes in float32, and x is float64"
    if "states" in asked:
        return "it does not save states"
    if op == "selective_scan" and "h0" in asked:
        return "it starts from a state of zero"
    if N > 256:
        return f"it takes at most 256 states per channel, and N is {N}"
    return None


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
) -> ScanOut:
    """The scan of Mamba-2; see `hooked_mamba.ops.ssd`. The chunk is rounded up to a power of two from 16 on."""
    if positions is not None:
        raise ValueError("mamba_ssm's chunked scan saves no states: use another backend")
    chunk = max(16, 1 << (chunk - 1).bit_length())
    y, h_last = mamba_chunk_scan_combined(
        x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), chunk,
        D=None if D is None else D.float(), initial_states=h0, return_final_states=True,
    )  # fmt: skip
    return ScanOut(y, h_last.float(), None)
