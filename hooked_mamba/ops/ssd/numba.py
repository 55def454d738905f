"""Mamba-2 through numba: the recurrence position after position, float32 on the CPU, one pass over the state.

With u = dt x and d = exp(dt A) the scan, in `_numba_kernels`, is linear in u. Gradients are taken by chunks, in
`_numba_chunks`, or position after position where states in the middle have gradients too. Where only x, D and h0 need
one, the forward kernel gives it, run from the end with B and C exchanged. `chunk` changes nothing here: pieces of a
sequence always give the bits of the whole.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.memory import fresh
from hooked_mamba.ops.numba_compile import refusal, share, threads_for
from hooked_mamba.ops.numba_lanes import LANES
from hooked_mamba.ops.numba_packed import pack_states, unpack_states
from hooked_mamba.ops.precision import to_state_dtype
from hooked_mamba.ops.ssd import _numba_chunks as chunks
from hooked_mamba.ops.ssd import _numba_kernels as kernels
from hooked_mamba.ops.ssd._step import ssd_step


def _probe() -> None:
    x = torch.zeros(1, 2, 1, LANES, dtype=torch.float32, device="cpu")
    dt, A = x[..., 0], x[0, 0, :, 0]
    _Scan.apply(x, dt, A, x, x, A, None, None, LANES)


@backend("ssd", takes={"h0", "states", "grad"}, refuses=lambda x, N: refusal(x, _probe))
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
    """The scan of Mamba-2; see `hooked_mamba.ops.ssd`."""
    if x.shape[1] == 1:
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B, C, D, h0))
        step = ssd_step if gradient or B.shape[3] % LANES else _step
        return step(x, dt, A, B, C, D, h0, positions is not None)
    dtype, P, N = x.dtype, x.shape[3], B.shape[3]
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    D = x.new_zeros(x.shape[2]) if D is None else D
    if P % LANES:
        x = F.pad(x, (0, -P % LANES))
    if N % LANES:
        B, C = (F.pad(t, (0, -N % LANES)) for t in (B, C))
        h0 = None if h0 is None else F.pad(h0, (0, -N % LANES))
    y, h_last, states = _Scan.apply(x, dt, A, B, C, D, h0, positions, P)
    y = y[..., :P] if P % LANES else y
    if N % LANES:
        h_last, states = h_last[..., :N], None if states is None else states[..., :N]
    return ScanOut(y.to(dtype), h_last, states)


def _step(x, dt, A, B, C, D, h0, want_states: bool) -> ScanOut:
    """One position without gradients, one pass over the state; arguments as in `ssd_step`."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    batch, _, H, P = x.shape
    u, d = dt.unsqueeze(-1) * x, (dt * A).exp_()
    y, h = torch.empty_like(u), u.new_empty(batch, H, P, B.shape[3])
    tensors = (u, d, B.contiguous(), C.contiguous(), h if h0 is None else h0.contiguous(), h, y)
    arrays = (t.detach().numpy() for t in tensors)
    share(kernels.step, batch * H, h.numel(), (*arrays, h0 is None), ())
    if D is not None:
        y = torch.addcmul(y, D.unsqueeze(-1), x)
    return ScanOut(y.to(dtype), h, h.unsqueeze(1) if want_states else None)


def _empty(*like: int) -> Tensor:
    return torch.empty(*like or (0,) * 5, dtype=torch.float32, device="cpu")


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().numpy() for t in tensors)


def _forward(x, dt, d, B, C, D, h, starts, states, at):
    """y; h, packed, is moved on in place."""
    batch, _, H, P = x.shape
    y = torch.empty_like(x)
    arrays = _arrays(x, dt, d, B, C, D, h, y, starts, states)
    share(kernels.forward, batch * H * (P // LANES), x.numel() * B.shape[3] // 4, (*arrays, at), ())
    return y


class _Scan(torch.autograd.Function):
    """P and N are padded to multiples of 16; h0, h_last and states have the true P."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, positions, P):
        # In float64, since torch rounds the last bit of a float32 exp by where a number stands in memory.
        d = (dt.double() * A.double()).exp().float()
        x, dt, d, B, C, D = (t.contiguous() for t in (x, dt, d, B, C, D))
        batch, l, H, padded = x.shape
        packed = (padded // LANES, B.shape[3], LANES)
        h = x.new_zeros(batch, H, *packed) if h0 is None else pack_states(h0, P)
        ctx.full = any(ctx.needs_input_grad[1:5])
        keep = ctx.full or (positions is not None and any(ctx.needs_input_grad))
        starts = fresh(x, batch, -(-l // kernels.T), H, *packed) if keep else _empty(0, 0, 0, 0, 0, 0)
        states = _empty() if positions is None else fresh(x, batch, len(positions), H, P, B.shape[3])
        at = np.array(positions or (), np.int64)
        y = _forward(x, dt, d, B, C, D, h, starts, states, at)
        ctx.at, ctx.P = at, P
        ctx.save_for_backward(x if keep or ctx.needs_input_grad[5] else None, dt, d, A, B, C, D, starts)
        ctx.set_materialize_grads(False)
        return y, unpack_states(h, P), None if positions is None else states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates):
        x, dt, d, A, B, C, D, starts = ctx.saved_tensors
        batch, l, H = d.shape
        padded = -(-ctx.P // LANES) * LANES
        dy = d.new_zeros(batch, l, H, padded) if dy is None else dy.contiguous()
        if not ctx.full and dstates is None:
            dx, dh0 = _adjoint(dt, d, B, C, D, dy, dh_last, ctx.P, ctx.needs_input_grad[6])
            dD = (dy * x).sum((0, 1, 3)) if ctx.needs_input_grad[5] else None
            return dx, None, None, None, None, dD, dh0, None, None
        du, dl, dB, dC, dh0 = _gradients(ctx, dt.unsqueeze(-1) * x, d, B, C, starts, dy, dh_last, dstates)
        ddt, dD = torch.empty_like(dt), dt.new_empty(batch, H)
        arrays = _arrays(x, dt, D, dy, du, ddt, dD)
        share(kernels.to_x, batch * H, 8 * x.numel(), arrays, ())
        dl = dl.double()
        dA = (dl * dt.double()).sum((0, 1)).to(A.dtype)
        return du, ddt + (dl * A.double()).to(dt.dtype), dA, dB, dC, dD.sum(0), dh0, None, None


def _gradients(ctx, u, d, B, C, starts, dy, dh_last, dstates):
    """To u, log d, B, C and h0."""
    batch, _, H, padded = dy.shape
    N = B.shape[3]
    du, dl = torch.empty_like(dy), torch.zeros_like(d)
    work = dy.numel() * N
    threads = threads_for(batch * H, work)
    dB, dC = d.new_zeros(threads, *B.shape), d.new_zeros(threads, *C.shape)
    shares = [_arrays(du, dl, dB[i], dC[i]) for i in range(threads)]
    inputs = _arrays(u, d, B, C, starts, dy)
    if dstates is None:
        g = d.new_zeros(batch, H, padded // LANES, N, LANES) if dh_last is None else pack_states(dh_last, ctx.P)
        share(chunks.backward, batch * H, work, (*inputs, g.numpy()), *shares)
        dh0 = unpack_states(g, ctx.P) if ctx.needs_input_grad[6] else None
    else:
        g = d.new_zeros(batch, H, padded, N)
        if dh_last is not None:
            g[:, :, : ctx.P] = dh_last
        share(kernels.backward, batch * H, work, (*inputs, *_arrays(g, dstates.contiguous()), ctx.at), *shares)
        dl, dh0 = dl * d, g[:, :, : ctx.P] if ctx.needs_input_grad[6] else None
    return du, dl, dB.sum(0), dC.sum(0), dh0


def _adjoint(dt, d, B, C, D, dy, dh_last, P, need_h0):
    """Gradients to x and h0 alone: g_t = d_{t+1} g_{t+1} + dy_t C_t^T, dx_t = dt_t g_t B_t + D dy_t, dh0 = d_0 g_0."""
    packed = (dy.shape[3] // LANES, B.shape[3], LANES)
    g = d.new_zeros(*d.shape[::2], *packed) if dh_last is None else pack_states(dh_last, P)
    onward, none = torch.cat([d[:, 1:], torch.ones_like(d[:, :1])], 1), torch.zeros_like(D)
    turned = [t.flip(1).contiguous() for t in (dy, torch.ones_like(d), onward, C, B)]
    du = _forward(*turned, none, g, _empty(0, 0, 0, 0, 0, 0), _empty(), np.empty(0, np.int64)).flip(1)
    dh0 = unpack_states(g, P) * d[:, 0, :, None, None] if need_h0 else None
    return torch.addcmul(D.unsqueeze(-1) * dy, dt.unsqueeze(-1), du), dh0
