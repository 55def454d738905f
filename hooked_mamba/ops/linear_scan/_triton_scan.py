"""The first-order scan h_t = a_t h_{t-1} + b_t on a GPU."""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.linear_scan._triton_backward import linear_backward
from hooked_mamba.ops.linear_scan._triton_forward import linear_forward
from hooked_mamba.ops.triton_launch import on_device

TILE = 2048
"""Numbers per tile."""


def linear_scan(
    a: Float[Tensor, "..."], b: Float[Tensor, "b l ..."], *, h0: Float[Tensor, "..."] | None
) -> Float[Tensor, "b l ..."]:
    """Scan over axis 1; see `hooked_mamba.ops.linear_scan`."""
    h = _LinearScan.apply(a.float().expand(b.shape), b.float(), None if h0 is None else h0.float())
    return h.to(b.dtype)


def _tiling(b: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict[str, int]]:
    """Grid, sizes and options of a launch."""
    columns = b[0, 0].numel()
    BC = min(64, triton.next_power_of_2(columns))
    T = min(TILE // BC, max(16, triton.next_power_of_2(b.shape[1])))
    sizes = (b.shape[1], columns, triton.cdiv(b.shape[1], T))
    return (triton.cdiv(columns, BC) * b.shape[0],), sizes, {"T": T, "BC": BC, "num_warps": 4}


class _LinearScan(torch.autograd.Function):
    """a, b and h0 are float32, a has the shape of b."""

    @staticmethod
    def forward(ctx, a, b, h0):
        a, b, h0 = (None if t is None else t.contiguous() for t in (a, b, h0))
        h = torch.empty_like(b)
        grid, sizes, options = _tiling(b)
        with on_device(b):
            linear_forward[grid](a, b, h0, h, *sizes, **options)
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        a, h, h0 = ctx.saved_tensors
        need_a, _, need_h0 = ctx.needs_input_grad
        db = torch.empty_like(h)
        da = torch.empty_like(h) if need_a else None
        dh0 = torch.empty_like(h0) if need_h0 else None
        grid, sizes, options = _tiling(h)
        with on_device(h):
            linear_backward[grid](a, h, h0, dh.contiguous(), da, db, dh0, *sizes, **options)
        return da, db, dh0
