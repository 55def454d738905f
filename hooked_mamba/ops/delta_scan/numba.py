"""The delta rule through numba: position after position, float32 on the CPU, any decay.

Faster than matrix products over chunks, and more exact; pieces of a sequence give the bits of the whole. The kernels
are in `_numba_kernels`. Where only v and h0 need a gradient, the forward kernel gives it, run from the end.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.delta_scan import _numba_kernels as kernels
from hooked_mamba.ops.delta_scan._adjoint import before_the_first, from_the_end
from hooked_mamba.ops.delta_scan.naive import full
from hooked_mamba.ops.interface import DeltaScanOut
from hooked_mamba.ops.memory import fresh
from hooked_mamba.ops.numba_compile import refusal, share
from hooked_mamba.ops.numba_lanes import LANES
from hooked_mamba.ops.numba_packed import pack_states, unpack_states
from hooked_mamba.ops.precision import state_dtype


def _probe() -> None:
    x = torch.zeros(1, 2, 1, LANES, dtype=torch.float32, device="cpu")
    _DeltaScan.apply(x, x, x, x, x, x, None, None, LANES)


@backend("delta_scan", takes={"h0", "states", "grad"}, refuses=lambda x, N: refusal(x, _probe))
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
    dtype, work, K, V = v.dtype, state_dtype(v), k.shape[3], v.shape[3]
    r, w, k, v, a, b = (t.to(work) for t in (r, w, k, v, a, b))
    h0 = None if h0 is None else h0.to(work)
    if K % LANES:
        b = full(b, k)
        r, k, a, b = (F.pad(t, (0, -K % LANES)) for t in (r, k, a, b))
        w = F.pad(w, (0, -K % LANES)) if w.shape[3] > 1 else w.expand(-1, -1, -1, k.shape[3])
        h0 = None if h0 is None else F.pad(h0, (0, -K % LANES))
    v = F.pad(v, (0, -V % LANES)) if V % LANES else v
    y, h_last, states, recall = _DeltaScan.apply(r, w, k, v, a, b, h0, positions, V)
    if K % LANES:
        h_last, states = h_last[..., :K], None if states is None else states[..., :K]
    if V % LANES:
        y, recall = y[..., :V], recall[..., :V]
    return DeltaScanOut(y.to(dtype), h_last, states, recall.to(dtype))


def _empty() -> Tensor:
    return torch.empty(0, 0, 0, 0, 0, dtype=torch.float32, device="cpu")


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().numpy() for t in tensors)


def _forward(inputs, h, starts, states, positions):
    """y and recall; h, packed, is moved on in place."""
    k, v = inputs[2:4]
    batch, _, H, K = k.shape
    y, recall = torch.empty_like(v), torch.empty_like(v)
    arrays = _arrays(*inputs, h, y, recall, starts, states)
    share(kernels.forward, batch * H * (v.shape[3] // LANES), v.numel() * K // 4, (*arrays, positions), ())
    return y, recall


class _DeltaScan(torch.autograd.Function):
    """K and V are padded to multiples of 16; h0, h_last and states have the true V."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, h0, positions, V):
        inputs = tuple(t.contiguous() for t in (r, w, k, v, a, b))
        batch, l, H, K = k.shape
        packed = (v.shape[3] // LANES, K, LANES)
        h = v.new_zeros(batch, H, *packed) if h0 is None else pack_states(h0, V)
        keep = any(ctx.needs_input_grad[:7])
        starts = fresh(v, batch, -(-l // kernels.T), H, *packed) if keep else v.new_empty((0,) * 6)
        states = _empty() if positions is None else fresh(v, batch, len(positions), H, V, K)
        at = np.array(positions or (), np.int64)
        y, recall = _forward(inputs, h, starts, states, at)
        ctx.at, ctx.V = at, V
        ctx.save_for_backward(*inputs, recall, starts)
        ctx.set_materialize_grads(False)
        return y, unpack_states(h, V), None if positions is None else states, recall

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates, drecall):
        *inputs, b, recall, starts = ctx.saved_tensors
        _, w, k, v, _ = inputs
        inputs.append(full(b, k))
        dy = torch.zeros_like(v) if dy is None else dy.contiguous()
        if dstates is None and drecall is None and not any(ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)):
            return _adjoint(inputs, dy, dh_last, ctx.V, ctx.needs_input_grad[6])
        batch, _, H, K = k.shape
        padded = v.shape[3]
        g = v.new_zeros(batch, H, padded, K)
        if dh_last is not None:
            g[:, :, : ctx.V] = dh_last
        drecall = torch.zeros_like(v) if drecall is None else drecall.contiguous()
        at = ctx.at if dstates is not None else np.empty(0, np.int64)
        dstates = _empty() if dstates is None else dstates.contiguous()
        dr, dw, dk, da, db = (torch.zeros_like(k) for _ in range(5))
        dv = torch.empty_like(v)
        arrays = (*_arrays(*inputs, recall, starts, dy, drecall, g, dstates), at, *_arrays(dr, dw, dk, dv, da, db))
        share(kernels.backward, batch * H, v.numel() * K, arrays, ())
        if w.shape[3] == 1:
            dw = dw.sum(-1, keepdim=True)
        if b.shape[3] == 1:
            dk, db = dk.addcmul_(db, b), (db * k).sum(-1, keepdim=True)
        return dr, dw, dk, dv, da, db, g[:, :, : ctx.V] if ctx.needs_input_grad[6] else None, None, None


def _adjoint(inputs, dy, dh_last, V, need_h0):
    """Gradients to v and h0 alone."""
    r, w, k, v, a, b = inputs
    batch, _, H, K = k.shape
    packed = v.new_zeros(batch, H, v.shape[3] // LANES, K, LANES) if dh_last is None else pack_states(dh_last, V)
    turned = tuple(t.contiguous() for t in from_the_end(r, w, k, dy, a, b))
    dv, _ = _forward(turned, packed, v.new_empty((0,) * 6), _empty(), np.empty(0, np.int64))
    dh0 = before_the_first(unpack_states(packed, V), w, a, b) if need_h0 else None
    return None, None, None, dv.flip(1), None, None, dh0, None, None
