"""States of the Mamba-2 scan at chosen positions, from the states at the starts of the chunks.

Few positions: each is one matrix product over its chunk,
    h_t = exp(cum_t) h_in + sum_{s<=t} exp(cum_t - cum_s) dt_s x_s B_s^T,      cum within the chunk.
Many: the recurrence itself, which writes each state once and is bound by memory rather than by arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.memory import fresh
from hooked_mamba.ops.precision import wide_dtype


def states_at_positions(
    x: Float[Tensor, "b l H P"],
    dt: Float[Tensor, "b l H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b l G N"],
    h0: Float[Tensor, "b H P N"] | None,
    starts: Float[Tensor, "b c H P N"],
    positions: tuple[int, ...],
    chunk: int,
) -> Float[Tensor, "b S H P N"]:
    """States right after `positions`, differentiable."""
    l = x.shape[1]
    if 2 * len(positions) > l:
        states = _AllStates.apply(dt.unsqueeze(-1) * x, torch.exp(dt * A), B, h0)
        return states if len(positions) == l else states[:, list(positions)]
    return _few_states(x, dt, A, B, starts, positions, chunk)


def _few_states(x, dt, A, B, starts, positions, chunk):
    b, l, H, P = x.shape
    G, N = B.shape[2:]
    S = len(positions)
    at = torch.tensor(positions, device=x.device)
    missing = -l % chunk
    index = at.div(chunk, rounding_mode="floor")
    x, dt, B = (
        F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)).unflatten(1, (-1, chunk)).index_select(1, index)
        for t in (x, dt, B)
    )
    # Steps after the position are taken as 0: their exponents then add nothing and their inputs are gone.
    until = torch.arange(chunk, device=x.device) <= (at % chunk).unsqueeze(-1)
    dt = dt * until.unsqueeze(-1)
    cum = (dt.to(wide_dtype(x)) * A).cumsum(2)
    weighted = x * (dt * (cum[:, :, -1:] - cum).to(x.dtype).exp()).unsqueeze(-1)
    inputs = weighted.view(b, S, chunk, G, H // G * P).permute(0, 1, 3, 4, 2) @ B.transpose(2, 3)
    h_in = starts.index_select(1, index)
    return cum[:, :, -1].to(x.dtype).exp()[..., None, None] * h_in + inputs.view(b, S, H, P, N)


class _AllStates(torch.autograd.Function):
    """h_t = a_t h_{t-1} + u_t B_t^T at every position; u b l H P, a b l H, B b l G N."""

    @staticmethod
    def forward(ctx, u, a, B, h0):
        b, l, H, P = u.shape
        G, N = B.shape[2:]
        states = fresh(u, b, l, H, P, N)
        before = h0
        for u_t, a_t, B_t, h_t in zip(*_steps(u, a, B, states), strict=True):
            grouped = h_t.view(b, G, H // G, P, N)
            torch.mul(u_t.reshape(b, G, H // G, P, 1), B_t, out=grouped)
            if before is not None:
                h_t.addcmul_(a_t, before)
            before = h_t
        ctx.save_for_backward(u, a, B, h0, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dstates):
        u, a, B, h0, states = ctx.saved_tensors
        need_u, need_a, need_B, need_h0 = ctx.needs_input_grad
        b, l, H, P = u.shape
        G, N = B.shape[2:]
        du, da, dB = (torch.zeros_like(t) if needed else None for t, needed in ((u, need_u), (a, need_a), (B, need_B)))
        g = u.new_zeros(b, H, P, N)
        grouped = g.view(b, G, -1, N)
        for t in reversed(range(l)):
            g.add_(dstates[:, t])
            if need_u:
                du[:, t] = (grouped @ B[:, t].unsqueeze(-1)).view(b, H, P)
            if need_B:
                dB[:, t] = (u[:, t].reshape(b, G, 1, -1) @ grouped).squeeze(2)
            before = states[:, t - 1] if t else h0
            if need_a and before is not None:
                da[:, t] = (g * before).sum((-2, -1))
            g.mul_(a[:, t, :, None, None])
        return du, da, dB, g if need_h0 else None


def _steps(u, a, B, states):
    return (
        u.unbind(1),
        a[..., None, None].unbind(1),
        B[:, :, :, None, None].unbind(1),
        states.unbind(1),
    )
