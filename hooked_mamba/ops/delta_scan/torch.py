"""The delta rule in plain torch: chunks of matrix products (Yang et al. 2024, section 3; arXiv 2406.06484).

Inside a chunk, with cum_t = sum_{s<=t} log w_s and S_0 the state that enters it, per head:
    u_t = S_{t-1} a_t                                                   what is recalled; U solves a triangular system
    U   = (1 - AB)^-1 (a_in S_0^T + AK V)       AB_ts = sum_K a_t exp(cum_{t-1} - cum_s) b_s for s < t, AK likewise
    Y   = r_in S_0^T + RB U + RK V              RB_ts = sum_K r_t exp(cum_t - cum_s) b_s for s <= t, RK likewise
    S_C = S_0 diag(exp cum_C) + sum_s (u_s b_s^T + v_s k_s^T) diag(exp(cum_C - cum_s))
with a_in = a exp(cum_{t-1}) and r_in = r exp(cum_t). Logarithms are summed in float64. A decay per key enters a product
as exp(cum_t) exp(-cum_s), which stays within float32 as long as no decay is below `SMALLEST`; where one is, or is zero
or negative (an edited decay), the loop over positions runs. Gradients come from autograd.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.delta_scan import naive
from hooked_mamba.ops.interface import DeltaScanOut
from hooked_mamba.ops.precision import state_dtype, wide_dtype

CHUNK = 64
"""Positions whose products are made together."""

SMALLEST, LARGEST = 0.5, 1.25
"""Decays per key that the chunks take: RWKV-7's lie in (0.545, 1), and 0.5^-64 is 2e19."""


@backend("delta_scan", takes={"h0", "states", "grad"})
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
    length = v.shape[1]
    if length == 1 or not _within_reach(w):
        return naive.delta_scan(r, w, k, v, a, b, h0=h0, positions=positions)
    dtype, work, b = v.dtype, state_dtype(v), naive.full(b, k)
    log_w = w.to(wide_dtype(v)).log()
    r, w, k, v, a, b, log_w = (t.transpose(1, 2).to(t.dtype if t is log_w else work) for t in (r, w, k, v, a, b, log_w))
    S = v.new_zeros(*v.shape[:2], v.shape[3], k.shape[3]) if h0 is None else h0.to(work)
    ys, recalls, states = [], [], []
    for start in range(0, length, CHUNK):
        here = slice(start, start + CHUNK)
        y, u, after = _chunk(S, *(t[:, :, here] for t in (r, k, v, a, b, log_w)))
        if positions is not None:
            wanted = [p - start for p in positions if start <= p < start + CHUNK]
            states += _states(S, u, *(t[:, :, here] for t in (w, k, v, b)), wanted=wanted)
        ys.append(y)
        recalls.append(u)
        S = after
    y, recall = (torch.cat(each, 2).transpose(1, 2).to(dtype) for each in (ys, recalls))
    return DeltaScanOut(y, S, torch.stack(states, 1) if states else None, recall)


def _within_reach(w: Tensor) -> bool:
    """Whether chunks are exact: one decay per head divides nothing, but its gradient is a small difference by it."""
    low, high = w.detach().aminmax()
    differentiated = torch.is_grad_enabled() and w.requires_grad
    smallest = SMALLEST if w.shape[-1] > 1 else 0.1 if differentiated else torch.finfo(w.dtype).tiny
    return bool((low >= smallest) & (high <= LARGEST))


def _chunk(S, r, k, v, a, b, log_w):
    """y, what was recalled, and the state after a chunk; all b H c ., decays in float64."""
    dtype, length = v.dtype, v.shape[2]
    cum = log_w.cumsum(2)
    before = torch.nn.functional.pad(cum[:, :, :-1], (0, 0, 1, 0))
    into, into_before = cum.exp().to(dtype), before.exp().to(dtype)
    tail = (cum[:, :, -1:] - cum).exp().to(dtype)
    causal = torch.ones(length, length, dtype=torch.bool, device=v.device).tril()
    strictly = causal.tril(-1)
    r_in, a_in = r * into, a * into_before
    if log_w.shape[-1] == 1:
        # A decay per head is a factor of each pair (t, s): masked before the exponential, it never exceeds 1.
        past = (before - cum.transpose(-1, -2)).masked_fill(~strictly, -torch.inf).exp().to(dtype)
        upto = (cum - cum.transpose(-1, -2)).masked_fill(~causal, -torch.inf).exp().to(dtype)
        AB, AK = (a @ t.transpose(-1, -2) * past for t in (b, k))
        RB, RK = (r @ t.transpose(-1, -2) * upto for t in (b, k))
    else:
        out = (-cum).exp().to(dtype)
        AB, AK = ((a_in @ (t * out).transpose(-1, -2)).tril(-1) for t in (b, k))
        RB, RK = ((r_in @ (t * out).transpose(-1, -2)).tril() for t in (b, k))
    S_t = S.transpose(-1, -2)
    u = torch.linalg.solve_triangular(-AB, a_in @ S_t + AK @ v, upper=False, unitriangular=True)
    y = r_in @ S_t + RB @ u + RK @ v
    after = S * into[:, :, -1:] + u.transpose(-1, -2) @ (b * tail) + v.transpose(-1, -2) @ (k * tail)
    return y, u, after


def _states(S, u, w, k, v, b, *, wanted: list[int]) -> list[Tensor]:
    """States after the wanted positions of a chunk: the recurrence, with what is recalled already known."""
    states = []
    for t in range(wanted[-1] + 1 if wanted else 0):
        written = u[:, :, t, :, None] * b[:, :, t, None] + v[:, :, t, :, None] * k[:, :, t, None]
        S = S * w[:, :, t, None] + written
        if t in wanted:
            states.append(S)
    return states
