"""The delta rule on a GPU: which kernels run, with what, in forward and backward.

Forward: one kernel. Backward: all gradients from states kept every `T` positions; or, where only v and h0 need one, the
forward kernel run from the end.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.delta_scan._adjoint import before_the_first, from_the_end
from hooked_mamba.ops.delta_scan._triton_backward import delta_backward
from hooked_mamba.ops.delta_scan._triton_forward import delta_forward
from hooked_mamba.ops.delta_scan.naive import full
from hooked_mamba.ops.interface import DeltaScanOut
from hooked_mamba.ops.triton_launch import on_device

T = 32
"""Positions between the states kept for the backward."""

STATES = 1024
"""Numbers of the state per program, which is one warp: 32 registers a lane."""


def delta_scan(
    r: Float[Tensor, "b l H K"],
    w: Float[Tensor, "b l H W"],
    k: Float[Tensor, "b l H K"],
    v: Float[Tensor, "b l H V"],
    a: Float[Tensor, "b l H K"],
    b: Float[Tensor, "b l H B"],
    *,
    h0: Float[Tensor, "b H V K"] | None,
    positions: tuple[int, ...] | None,
) -> DeltaScanOut:
    """See `hooked_mamba.ops.delta_scan`."""
    b, h0 = full(b, k), None if h0 is None else h0.float()
    y, h_last, states, recall = _DeltaScan.apply(r, w, k, v, a, b, h0, positions)
    return DeltaScanOut(y, h_last, states, recall)


def _tiles(w: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, int | bool]]:
    """Grid, sizes and options of a launch."""
    batch, l, H, K = k.shape
    V = v.shape[3]
    BK = triton.next_power_of_2(K)
    BV = max(1, min(triton.next_power_of_2(V), STATES // BK))
    options = {"T": T, "BV": BV, "BK": BK, "WIDE": w.shape[3] == K, "num_warps": 1}
    return (triton.cdiv(V, BV) * H * batch,), (l, H, K, V, triton.cdiv(l, T)), options


def _save_table(positions: tuple[int, ...] | None, v: Tensor) -> Tensor | None:
    """For every position the index of its state among those that are saved, or -1."""
    if positions is None:
        return None
    table = torch.full((v.shape[1],), -1, dtype=torch.int32)
    table[list(positions)] = torch.arange(len(positions), dtype=torch.int32)
    return table.to(v.device)


def _forward(inputs, h0, positions, keep):
    """y, h_last, states, recall, and the states at every T positions if they are to be kept."""
    _, w, k, v, _, _ = inputs
    batch, l, H, K = k.shape
    state = (H, v.shape[3], K)
    y, recall = torch.empty_like(v), torch.empty_like(v)
    h_last = torch.empty(batch, *state, dtype=torch.float32, device=v.device)
    starts = h_last.new_empty(batch, triton.cdiv(l, T), *state) if keep else None
    states = None if positions is None else h_last.new_empty(batch, len(positions), *state)
    grid, sizes, options = _tiles(w, k, v)
    with on_device(v):
        delta_forward[grid](
            *inputs, h0, _save_table(positions, v), y, recall, starts, h_last, states,
            *sizes, len(positions or ()), **options,
        )  # fmt: skip
    return y, h_last, states, recall, starts


class _DeltaScan(torch.autograd.Function):
    """h0 is float32."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, h0, positions):
        inputs = tuple(t.contiguous() for t in (r, w, k, v, a, b))
        h0 = None if h0 is None else h0.contiguous()
        *out, starts = _forward(inputs, h0, positions, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, starts)
        ctx.positions = positions
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates, drecall):
        *inputs, starts = ctx.saved_tensors
        _, w, _, v, a, b = inputs
        dy = torch.zeros_like(v) if dy is None else dy.contiguous()
        dh_last, dstates, drecall = (None if g is None else g.contiguous() for g in (dh_last, dstates, drecall))
        if dstates is None and drecall is None and not any(ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)):
            turned = tuple(t.contiguous() for t in from_the_end(*inputs[:3], dy, a, b))
            dv, g, *_ = _forward(turned, dh_last, None, keep=False)
            dh0 = before_the_first(g, w, a, b) if ctx.needs_input_grad[6] else None
            return None, None, None, dv.flip(1), None, None, dh0, None
        return _all_gradients(inputs, starts, dy, dh_last, dstates, drecall, ctx)


def _all_gradients(inputs, starts, dy, dh_last, dstates, drecall, ctx):
    _, w, k, v, _, _ = inputs
    batch, _, H, K = k.shape
    grid, sizes, options = _tiles(w, k, v)
    parts = triton.cdiv(v.shape[3], options["BV"])
    dr, dw, dk, da, db = (starts.new_empty(parts, *k.shape) for _ in range(5))
    dv, dh0 = starts.new_empty(v.shape), starts.new_empty(batch, H, v.shape[3], K)
    scratch = starts.new_empty(grid[0], T, options["BV"], options["BK"])
    positions = ctx.positions if dstates is not None else None
    with on_device(v):
        delta_backward[grid](
            *inputs, _save_table(positions, v), starts, scratch, dy, drecall, dh_last, dstates,
            dr, dw, dk, dv, da, db, dh0, *sizes, len(positions or ()), batch, **options,
        )  # fmt: skip
    dr, dw, dk, da, db = (part.sum(0) for part in (dr, dw, dk, da, db))
    if w.shape[3] != K:
        dw = dw.sum(-1, keepdim=True)
    grads = (g.to(t.dtype) for g, t in zip((dr, dw, dk, dv, da, db), inputs, strict=True))
    return *grads, dh0 if ctx.needs_input_grad[6] else None, None
