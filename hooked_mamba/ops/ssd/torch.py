"""Mamba-2 in plain torch: chunks of matrix products (Dao & Gu 2024, section 6), and its own backward.

Forward, one chunk after another, s and t positions in it, everything per head:
    cum_t = sum_{s<=t} dt_s A                         (never positive)
    M_ts  = (C_t . B_s) exp(cum_t - cum_s), s <= t    (C B^T once per group; masked BEFORE the exponential)
    y_t   = sum_s M_ts dt_s x_s + exp(cum_t) C_t h_in + D x_t
    h_out = exp(cum_last) h_in + sum_s exp(cum_last - cum_s) dt_s x_s B_s^T
Backward, from the last chunk to the first, from the states at the chunks' starts, which are all that is kept.

A last chunk that is not full is filled up with steps dt = 0, which change nothing. Every chunk is thus
computed with the same shapes, and a piece of a sequence to the same bits as the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.memory import fresh
from hooked_mamba.ops.precision import to_state_dtype, wide_dtype
from hooked_mamba.ops.ssd._step import ssd_step
from hooked_mamba.ops.ssd._torch_states import states_at_positions


@backend("ssd", takes={"h0", "states", "grad"})
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
    """The chunked scan; see `hooked_mamba.ops.ssd`."""
    if x.shape[1] == 1:
        return ssd_step(x, dt, A, B, C, D, h0, positions is not None)
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    y, h_last, starts = _ChunkedScan.apply(x, dt, A, B, C, D, h0, chunk, positions is not None)
    states = None
    if positions is not None:
        states = states_at_positions(x, dt, A, B, h0, starts, positions, chunk)
    return ScanOut(y.to(dtype), h_last, states)


class _Chunk(NamedTuple):
    """What forward and backward both need of one chunk; t and s are positions in it."""

    dt: Tensor
    """b t H"""
    B: Tensor
    """b G t N"""
    C: Tensor
    """b G t N"""
    u: Tensor
    """dt x, b t H P"""
    M: Tensor
    """b H t s"""
    decay: Tensor
    """exp(cum_t - cum_s) for s <= t, else 0: b H t s"""
    into: Tensor
    """exp(cum_t), the weight of h_in at t: b t H 1"""
    tail: Tensor
    """exp(cum_last - cum_s), the weight of s in h_out: b s H 1"""


def _padded(t: Tensor, start: int, chunk: int) -> Tensor:
    """Positions start..start+chunk, filled up with zeros; laid out alike, full or not: products round by strides."""
    piece = t[:, start : start + chunk]
    missing = chunk - piece.shape[1]
    return F.pad(piece, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else piece.contiguous()


def _prepare(x, dt, A, B, C, start, chunk, upper) -> _Chunk:
    b, _, H, _ = x.shape
    G = B.shape[2]
    dt = _padded(dt, start, chunk)
    B, C = _padded(B, start, chunk).transpose(1, 2), _padded(C, start, chunk).transpose(1, 2)
    u = _padded(x, start, chunk) * dt.unsqueeze(-1)
    # Differences of long sums: in float32 a small exponent behind a sum of -100 would be off by 1e-5.
    cum = (dt.to(wide_dtype(x)) * A).cumsum(1).transpose(1, 2).contiguous()
    decay = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(x.dtype).masked_fill_(upper, -torch.inf).exp_()
    CB = C @ B.transpose(-1, -2)
    M = (decay.view(b, G, H // G, chunk, chunk) * CB.unsqueeze(2)).view(b, H, chunk, chunk)
    into = cum.to(x.dtype).exp().transpose(1, 2).unsqueeze(-1)
    # The last row of `decay`, where exp(0) = 1 stands at s = t exactly.
    tail = decay[:, :, -1].transpose(1, 2).unsqueeze(-1)
    return _Chunk(dt, B, C, u, M, decay, into, tail)


def _by_group(t: Tensor, G: int) -> Tensor:
    """View b t H P as b G t (R P), R heads in each of G groups."""
    b, length, H, P = t.shape
    return t.reshape(b, length, G, H // G * P).transpose(1, 2)


def _by_head(t: Tensor, H: int) -> Tensor:
    """View b G t (R P) as b t H P."""
    b, _, length, _ = t.shape
    return t.transpose(1, 2).reshape(b, length, H, -1)


class _ChunkedScan(torch.autograd.Function):
    """Returns y, h_last and, if wanted, the states at the chunks' starts, b c H P N."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, chunk, want_starts):
        b, l, H, P = x.shape
        G, N = B.shape[2:]
        count = -(-l // chunk)
        h = x.new_zeros(b, H, P, N) if h0 is None else h0.clone(memory_format=torch.contiguous_format)
        y = torch.empty((b, l, H, P), dtype=x.dtype, device=x.device)
        keep = want_starts or any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        starts = fresh(x, b, count, H, P, N) if keep else None
        upper = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu_(1)
        grouped = h.view(b, G, -1, N)
        for i in range(count):
            t0 = i * chunk
            n = min(chunk, l - t0)
            if starts is not None:
                starts[:, i].copy_(h)
            k = _prepare(x, dt, A, B, C, t0, chunk, upper)
            out = _by_head(k.C @ grouped.transpose(-1, -2), H).mul_(k.into)
            out.add_((k.M @ k.u.transpose(1, 2)).transpose(1, 2))
            y[:, t0 : t0 + n] = out[:, :n]
            h.mul_(k.into[:, -1].unsqueeze(-1))
            grouped.add_(_by_group(k.u * k.tail, G).transpose(-1, -2) @ k.B)
        if D is not None:
            y.addcmul_(D.unsqueeze(-1), x)
        ctx.chunk = chunk
        ctx.save_for_backward(x, dt, A, B, C, D, starts)
        ctx.set_materialize_grads(False)
        return y, h, starts if want_starts else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstarts):
        grads = _backward(ctx.saved_tensors, ctx.chunk, dy, dh_last, dstarts, ctx.needs_input_grad)
        return (*grads, None, None)


def _backward(saved, chunk, dy, dh_last, dstarts, needs):
    x, dt, A, B, C, D, starts = saved
    need_x, need_dt, need_A, need_B, need_C, need_D, need_h0 = needs[:7]
    b, l, H, P = x.shape
    G, N = B.shape[2:]
    need_decay = need_dt or need_A
    upper = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu_(1)
    g = x.new_zeros(b, H, P, N) if dh_last is None else dh_last.clone(memory_format=torch.contiguous_format)
    grouped = g.view(b, G, -1, N)
    dx = torch.zeros_like(x) if need_x else None
    ddt = torch.zeros_like(dt) if need_dt else None
    dA = torch.zeros_like(A) if need_A else None
    dB, dC = (torch.zeros_like(t) if needed else None for t, needed in ((B, need_B), (C, need_C)))
    for i in reversed(range(-(-l // chunk))):
        t0 = i * chunk
        n = min(chunk, l - t0)
        here = slice(t0, t0 + n)
        k = _prepare(x, dt, A, B, C, t0, chunk, upper)
        dout = x.new_zeros(b, chunk, H, P) if dy is None else _padded(dy, t0, chunk)
        dout_h = dout.transpose(1, 2)
        # What reaches u = dt x: through the chunk's own outputs, and through the state that leaves it.
        du_tail = _by_head(k.B @ grouped.transpose(-1, -2), H).mul_(k.tail)
        du = (k.M.transpose(-1, -2) @ dout_h).transpose(1, 2) + du_tail
        if need_x:
            dx[:, here] = (du * k.dt.unsqueeze(-1))[:, :n]
        dout_in = dout * k.into
        if need_decay or need_B or need_C:
            dM = dout_h @ k.u.permute(0, 2, 3, 1)
            dCB = (dM * k.decay).view(b, G, H // G, chunk, chunk).sum(2)
        if need_decay or need_C:
            h_in = starts[:, i].reshape(b, G, -1, N)
        if need_B:
            piece = dCB.transpose(-1, -2) @ k.C + _by_group(k.u * k.tail, G) @ grouped
            dB[:, here] = piece.transpose(1, 2)[:, :n]
        if need_C:
            piece = dCB @ k.B + _by_group(dout_in, G) @ h_in
            dC[:, here] = piece.transpose(1, 2)[:, :n]
        if need_decay:
            # Gradient to the exponents dt_r A: a pair (t, s) counts for every r in s+1..t. The sums are made as
            # products with ones: as differences of running sums they would lose digits to cancellation.
            pairs = dM.mul_(k.M) @ upper.to(dM.dtype)
            dexp = pairs.tril_().sum(-2).transpose(1, 2)
            from_h_in = (dout_in * _by_head(k.C @ h_in.transpose(-1, -2), H)).sum(-1)
            dexp = dexp + from_h_in.flip(1).cumsum(1).flip(1)
            through = (k.u * du_tail).sum(-1)
            dexp += (k.into[:, -1].squeeze(-1) * (g * starts[:, i]).sum((-2, -1))).unsqueeze(1)
            dexp += through.cumsum(1) - through
            if need_dt:
                ddt[:, here] = (dexp * A + (du * _padded(x, t0, chunk)).sum(-1))[:, :n]
            if need_A:
                dA += (dexp * k.dt).sum((0, 1))
        g.mul_(k.into[:, -1].unsqueeze(-1))
        grouped.add_(_by_group(dout_in, G).transpose(-1, -2) @ k.C)
        if dstarts is not None:
            g.add_(dstarts[:, i])
    dD = None
    if D is not None and dy is not None:
        if need_x:
            dx.addcmul_(dy, D.unsqueeze(-1))
        if need_D:
            dD = (dy * x).sum((0, 1, 3))
    return dx, ddt, dA, dB, dC, dD, g if need_h0 else None
