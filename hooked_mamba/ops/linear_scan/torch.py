"""The first-order scan h_t = a_t h_{t-1} + b_t in plain torch, with a backward that keeps only a and h.

    forward     h_t = a_t h_{t-1} + b_t
    backward    g_t = dh_t + a_{t+1} g_{t+1}        (the same scan, run from the end)
                db_t = g_t,   da_t = g_t h_{t-1},   dh0 = a_1 g_1

a may be zero or negative: nothing is divided and no logarithm taken.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.memory import fresh


class _LinearScan(torch.autograd.Function):
    """a has b's number of axes and its length, other axes may be 1."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
        h = fresh(b, *b.shape)
        a_t, b_t, h_t = a.unbind(1), b.unbind(1), h.unbind(1)
        if h0 is None:
            h_t[0].copy_(b_t[0])
        else:
            torch.addcmul(b_t[0], a_t[0], h0, out=h_t[0])
        for t in range(1, len(h_t)):
            torch.addcmul(b_t[t], a_t[t], h_t[t - 1], out=h_t[t])
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        a, h, h0 = ctx.saved_tensors
        g = fresh(dh, *dh.shape).copy_(dh)
        a_t, g_t, h_t = a.unbind(1), g.unbind(1), h.unbind(1)
        for t in range(len(g_t) - 2, -1, -1):
            g_t[t].addcmul_(a_t[t + 1], g_t[t + 1])
        dh0 = a_t[0] * g_t[0] if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, g, dh0
        da = torch.zeros(a.shape, dtype=h.dtype, device=h.device)
        da_t = da.unbind(1)
        same = da_t[0].shape == h_t[0].shape
        before = (h0, *h_t[:-1])
        scratch = torch.empty_like(h_t[0])
        for t, h_before in enumerate(before):
            if h_before is None:
                continue
            torch.mul(g_t[t], h_before, out=da_t[t] if same else scratch)
            if not same:
                da_t[t].copy_(scratch.sum_to_size(da_t[t].shape))
        return da, g, dh0


@backend("linear_scan", takes={"h0", "grad"})
def linear_scan(
    a: Float[Tensor, "..."], b: Float[Tensor, "b l *rest"], *, h0: Float[Tensor, "..."] | None
) -> Float[Tensor, "b l *rest"]:
    """Scan over axis 1; see `hooked_mamba.ops.linear_scan`."""
    dtype = b.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    a = a.reshape((1,) * (b.ndim - a.ndim) + a.shape)
    a = a.expand(-1, b.shape[1], *a.shape[2:]).to(work)
    return _LinearScan.apply(a, b.to(work), None if h0 is None else h0.to(work)).to(dtype)
