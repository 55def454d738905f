"""The selective scan of Mamba-1 in plain torch, a tile of positions at a time, with its own backward.

Forward, for each tile of T positions:
    1. A_bar = exp(dt A) and Bx = dt B x for the whole tile, in scratch that every tile reuses,
    2. h_t = A_bar_t h_{t-1} + Bx_t, in place over Bx, one multiply-add per position,
    3. y = C h for the whole tile.
No tensor of shape b l E N is ever formed (unless all states are asked for: then h is copied there).
Scratch is laid out as N E: dt and x then meet A and B along whole rows, and C h adds rows.

What is computed at a position never depends on where its tile or the sequence ends, to the last bit. Two things
would make it: exp2 rounds differently in the last few numbers of what it is given, so it gets one position at a
time; matrix products round differently by the alignment of what they read, so rows are padded to whole cache lines.

Backward, tiles from the last to the first: states are computed again from the one kept at the start, then
    g_t = C_t dy_t + dstates_t + A_bar_{t+1} g_{t+1}             (the adjoint state)
    dx = dt (g B) + D dy        dB = sum_E g dt x        dC = sum_E h dy
    q = g A_bar h_{t-1}         ddt = sum_N q A + x (g B)       dA = sum_{b,l} q dt
Gradients nobody asked for are not computed; if those to dt, A and C are not needed, neither are the states.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.memory import fresh
from hooked_mamba.ops.precision import to_state_dtype
from hooked_mamba.ops.selective_scan._step import selective_step

TILE_BYTES = 2 << 20
"""Scratch for one tile of states: about what a core's second-level cache holds."""

LINE = 16
"""Numbers to whose multiple rows are padded: a cache line of float32."""


@backend("selective_scan", takes={"h0", "states", "grad"})
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
    """The fused scan; see `hooked_mamba.ops.selective_scan`."""
    if x.shape[1] == 1:
        return selective_step(x, dt, A, B, C, D, h0, positions is not None)
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    y, h_last, states = _SelectiveScan.apply(x, dt, A, B, C, D, h0, positions)
    return ScanOut(y.to(dtype), h_last, states)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, positions):
        need_dt, need_A, need_C = (ctx.needs_input_grad[i] for i in (1, 2, 4))
        y, h_last, states, starts = _forward(x, dt, A, B, C, D, h0, positions, need_dt or need_A or need_C)
        ctx.positions = positions
        ctx.save_for_backward(x, dt, A, B, C, D, starts)
        ctx.set_materialize_grads(False)
        return y, h_last, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates):
        grads = _backward(ctx.saved_tensors, ctx.positions, dy, dh_last, dstates, ctx.needs_input_grad)
        return (*grads, None)


def _tile(b: int, l: int, E: int, N: int, item: int) -> int:
    """Positions per tile."""
    return min(l, max(4, min(64, TILE_BYTES // max(1, b * E * N * item))))


def _time_major(t: Tensor, start: int, stop: int) -> Tensor:
    """View positions start..stop of b l ... as l b ..., so that unbinding it gives one step each."""
    return t[:, start:stop].transpose(0, 1)


def _forward(x, dt, A, B, C, D, h0, positions, keep_starts):
    b, l, E = x.shape
    N = A.shape[1]
    T = _tile(b, l, E, N, x.element_size())
    # exp2 is several times faster here than exp, and as exact; 0 still gives 1.
    rates = (A * math.log2(math.e)).t()
    if E % LINE:
        x, dt, rates = (F.pad(t, (0, -E % LINE)) for t in (x, dt, rates))
        D = None if D is None else F.pad(D, (0, -E % LINE))
    rates = rates.contiguous()
    W = x.shape[2]
    h = x.new_zeros(b, N, W)
    if h0 is not None:
        h[..., :E].copy_(h0.transpose(1, 2))
    y = torch.empty((b, l, W), dtype=x.dtype, device=x.device)
    starts = fresh(x, -(-l // T), b, N, W) if keep_starts else None
    states = None if positions is None else fresh(x, b, len(positions), E, N)
    A_bar, Bx = x.new_empty(T, b, N, W), x.new_empty(T, b, N, W)
    column = 0
    for i, t0 in enumerate(range(0, l, T)):
        t1 = min(l, t0 + T)
        n = t1 - t0
        if starts is not None:
            starts[i].copy_(h)
        a, hs = A_bar[:n], Bx[:n]
        dt_t = _time_major(dt, t0, t1).unsqueeze(2)
        u_t = dt_t * _time_major(x, t0, t1).unsqueeze(2)
        torch.mul(dt_t, rates, out=a)
        torch.mul(u_t, _time_major(B, t0, t1).unsqueeze(-1), out=hs)
        before = h
        for a_t, h_t in zip(a.unbind(0), hs.unbind(0), strict=True):
            h_t.addcmul_(a_t.exp2_(), before)
            before = h_t
        h.copy_(before)
        y[:, t0:t1] = torch.matmul(_time_major(C, t0, t1).unsqueeze(2), hs).squeeze(2).transpose(0, 1)
        while states is not None and column < len(positions) and positions[column] < t1:
            h_t = hs[positions[column] - t0]
            for sequence in range(b):  # A matrix at a time: its transpose has a fast copy.
                states[sequence, column].copy_(h_t[sequence, :, :E].t())
            column += 1
    if D is not None:
        y.addcmul_(D, x)
    return y[..., :E].contiguous(), h[..., :E].transpose(1, 2).contiguous(), states, starts


def _backward(saved, positions, dy, dh_last, dstates, needs):
    x, dt, A, B, C, D, starts = saved
    need_x, need_dt, need_A, need_B, need_C, need_D, need_h0 = needs[:7]
    b, l, E = x.shape
    N = A.shape[1]
    T = _tile(b, l, E, N, x.element_size())
    need_q = need_dt or need_A
    ones = x.new_ones(max(N, T * b))
    A_bar, G = x.new_empty(T, b, E, N), x.new_empty(T, b, E, N)
    Hs = x.new_empty(T + 1, b, E, N) if starts is not None else None
    carry = x.new_zeros(b, E, N) if dh_last is None else dh_last.clone(memory_format=torch.contiguous_format)
    dx = torch.zeros_like(x) if need_x else None
    ddt = torch.empty_like(dt) if need_dt else None
    dA = torch.zeros_like(A) if need_A else None
    dB = torch.empty_like(B) if need_B else None
    dC = torch.zeros_like(C) if need_C else None
    at = {} if dstates is None or len(positions) == l else {p: s for s, p in enumerate(positions)}
    for i in reversed(range(-(-l // T))):
        t0, t1 = i * T, min(l, i * T + T)
        n = t1 - t0
        a, g = A_bar[:n], G[:n]
        dt_t, B_t = _time_major(dt, t0, t1), _time_major(B, t0, t1)
        u_t = dt_t * _time_major(x, t0, t1)
        torch.mul(dt_t.unsqueeze(-1), A, out=a).exp_()
        if Hs is not None:
            Hs[0].copy_(starts[i, ..., :E].transpose(1, 2))
            hs = Hs[1 : n + 1]
            torch.mul(u_t.unsqueeze(-1), B_t.unsqueeze(2), out=hs)
            before = Hs[0]
            for a_t, h_t in zip(a.unbind(0), hs.unbind(0), strict=True):
                h_t.addcmul_(a_t, before)
                before = h_t
        if dy is None:
            g.zero_()
        else:
            dy_t = _time_major(dy, t0, t1)
            torch.mul(dy_t.unsqueeze(-1), _time_major(C, t0, t1).unsqueeze(2), out=g)
            if need_C:
                dC[:, t0:t1] = torch.matmul(dy_t.unsqueeze(2), hs).squeeze(2).transpose(0, 1)
        if dstates is not None and len(positions) == l:
            g.add_(_time_major(dstates, t0, t1))
        for t in range(t0, t1) if at else ():
            if t in at:
                g[t - t0].add_(dstates[:, at[t]])
        steps, decays = g.unbind(0), a.unbind(0)
        steps[-1].add_(carry)
        for t in range(n - 2, -1, -1):
            steps[t].addcmul_(decays[t + 1], steps[t + 1])
        torch.mul(decays[0], steps[0], out=carry)
        if need_B:
            dB[:, t0:t1] = torch.matmul(u_t.unsqueeze(2), g).squeeze(2).transpose(0, 1)
        if need_x or need_dt:
            gB = torch.matmul(g, B_t.unsqueeze(-1)).squeeze(-1)
            if need_x:
                torch.mul(gB, dt_t, out=_time_major(dx, t0, t1))
        if need_q:
            q = a.mul_(g).mul_(Hs[:n])
            if need_dt:
                # g is free by now: q A takes its place. Sums are products with ones, the fastest there is here.
                qA = torch.mul(q, A, out=g).view(-1, N) @ ones[:N]
                gB.mul_(_time_major(x, t0, t1)).add_(qA.view(gB.shape))
                ddt[:, t0:t1] = gB.transpose(0, 1)
            if need_A:
                q.mul_(dt_t.unsqueeze(-1))
                dA += (ones[: n * b] @ q.view(n * b, -1)).view(E, N)
    dD = None
    if D is not None and dy is not None:
        if need_x:
            dx.addcmul_(dy, D)
        if need_D:
            dD = (dy * x).sum((0, 1))
    return dx, ddt, dA, dB, dC, dD, carry if need_h0 else None
