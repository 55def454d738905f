"""Mamba-2, one position: the step of generation.

    h = exp(dt A) h_in + dt x B^T,      y = h C + D x            (per head, h is P x N)

One program per head and sequence, over blocks of P rows: the state is read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.triton_device import LOG2_E
from hooked_mamba.ops.triton_launch import on_device

STATES = 4096
"""Numbers of the state per program."""


@triton.jit
def step_kernel(
    X, DT, A, B, C, D, H_IN, Y, H_OUT, H, P, per_group,
    N: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """X, Y: b H P; DT: b H; B, C: b G N; states: b H P N, float32, H_IN None for zeros. Grid: P x heads x batch."""
    blocks = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    p = (pid % blocks) * BP + tl.arange(0, BP)
    head_of_all = pid // blocks
    head = head_of_all % H
    b = (head_of_all // H).to(tl.int64)
    n = tl.arange(0, BN)
    at_group = (b * (H // per_group) + head // per_group) * N + n
    at = head_of_all.to(tl.int64) * P * N + p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    dt = tl.load(DT + head_of_all)
    x = tl.load(X + head_of_all.to(tl.int64) * P + p, mask=p < P, other=0.0).to(tl.float32)
    Bt = tl.load(B + at_group, mask=n < N, other=0.0).to(tl.float32)
    Ct = tl.load(C + at_group, mask=n < N, other=0.0).to(tl.float32)
    h = (dt * x)[:, None] * Bt[None, :]
    if H_IN is not None:
        h += tl.exp2(dt * (tl.load(A + head) * LOG2_E)) * tl.load(H_IN + at, mask=inside, other=0.0)
    tl.store(H_OUT + at, h, mask=inside)
    y = tl.sum(h * Ct[None, :], 1)
    if D is not None:
        y += tl.load(D + head) * x
    tl.store(Y + head_of_all.to(tl.int64) * P + p, y.to(Y.dtype.element_ty), mask=p < P)


def ssd_step(
    x: Float[Tensor, "b 1 H P"],
    dt: Float[Tensor, "b 1 H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b 1 G N"],
    C: Float[Tensor, "b 1 G N"],
    D: Float[Tensor, " H"] | None,
    h0: Float[Tensor, "b H P N"] | None,
    want_states: bool,
) -> ScanOut:
    """One step of the Mamba-2 recurrence, without gradients."""
    b, _, H, P = x.shape
    N = B.shape[3]
    x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))
    D, h0 = (None if t is None else t.contiguous() for t in (D, h0))
    y, h = torch.empty_like(x), dt.new_empty(b, H, P, N)
    BN = triton.next_power_of_2(N)
    BP = max(1, min(triton.next_power_of_2(P), STATES // BN))
    with on_device(x):
        step_kernel[(triton.cdiv(P, BP) * H * b,)](
            x, dt, A, B, C, D, h0, y, h, H, P, H // B.shape[2], N=N, BN=BN, BP=BP, num_warps=4
        )
    return ScanOut(y, h, h.unsqueeze(1) if want_states else None)
