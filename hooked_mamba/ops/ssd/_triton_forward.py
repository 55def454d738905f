"""Mamba-2, the read-out of a chunk (Dao & Gu 2024, section 6), everything as matrix products.

    y_t = sum_{s<=t} (C_t . B_s) exp(cum_t - cum_s) dt_s x_s  +  exp(cum_t) h_in C_t  +  D x_t

The products C_t . B_s are the same for all heads of a group: `ssd_gram` makes them once per group. h_in comes from
`mamba2_states`. The exponent is masked before the exponential, where it would overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.ssd._triton_states import chunk_decays
from hooked_mamba.ops.triton_device import block_bounds


@triton.jit
def ssd_gram(
    B, C, TABLE, CB,
    L, G, N, b_row, c_row, n_chunks,
    Q: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CB_ts = C_t . B_s inside a chunk: b n_chunks G Q Q, float32. Grid: groups x chunks x batch, flattened."""
    pid = tl.program_id(0)
    group, pid = pid % G, pid // G
    chunk = pid % n_chunks
    b = (pid // n_chunks).to(tl.int64)
    begin, steps = block_bounds(TABLE, chunk, L, Q)
    q = tl.arange(0, Q)
    row = (b * L + begin + q)[:, None]
    valid = (q < steps)[:, None]
    gram = tl.zeros((Q, Q), tl.float32)
    for n_block in range(tl.cdiv(N, BN)):
        n = n_block * BN + tl.arange(0, BN)
        here = valid & (n < N)[None, :]
        Bt = tl.load(B + row * b_row + group * N + n[None, :], mask=here, other=0.0).to(DOT)
        Ct = tl.load(C + row * c_row + group * N + n[None, :], mask=here, other=0.0).to(DOT)
        gram = tl.dot(Ct, tl.trans(Bt), gram, input_precision=PRECISION)
    at = ((b * n_chunks + chunk) * G + group) * Q * Q
    tl.store(CB + at + q[:, None] * Q + q[None, :], gram)


@triton.jit
def ssd_read_out(
    X, DT, A, C, D, CB, H_IN, TABLE, Y,
    L, H, P, N, x_row, c_row, n_chunks, per_group,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of P x heads x chunks x batch, flattened. X, Y: b L H P; H_IN: b n_chunks H P N."""
    p_blocks = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    p_block, pid = pid % p_blocks, pid // p_blocks
    head, pid = pid % H, pid // H
    chunk = pid % n_chunks
    b = (pid // n_chunks).to(tl.int64)
    group = head // per_group

    begin, steps = block_bounds(TABLE, chunk, L, Q)
    dt, cum, _ = chunk_decays(DT, A, b, head, begin, steps, L, H, Q)
    q = tl.arange(0, Q)
    p = p_block * BP + tl.arange(0, BP)
    row = (b * L + begin + q)[:, None]
    valid = (q < steps)[:, None]
    at_state = ((b * n_chunks + chunk) * H + head) * P * N
    y = tl.zeros((Q, BP), tl.float32)
    for n_block in range(tl.cdiv(N, BN)):
        n = n_block * BN + tl.arange(0, BN)
        Ct = tl.load(C + row * c_row + group * N + n[None, :], mask=valid & (n < N)[None, :], other=0.0)
        h = tl.load(H_IN + at_state + p[:, None] * N + n[None, :], mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
        y = tl.dot(Ct.to(DOT), tl.trans(h.to(DOT)), y, input_precision=PRECISION)
    y *= tl.exp2(cum)[:, None]

    at_gram = ((b * n_chunks + chunk) * (H // per_group) + group) * Q * Q
    gram = tl.load(CB + at_gram + q[:, None] * Q + q[None, :])
    causal = q[:, None] >= q[None, :]
    mix = gram * tl.exp2(tl.where(causal, cum[:, None] - cum[None, :], float("-inf")))
    here = valid & (p < P)[None, :]
    x = tl.load(X + row * x_row + head * P + p[None, :], mask=here, other=0.0).to(tl.float32)
    y = tl.dot(mix.to(DOT), (x * dt[:, None]).to(DOT), y, input_precision=PRECISION)
    if D is not None:
        y += tl.load(D + head) * x
    tl.store(Y + (row * H + head) * P + p[None, :], y.to(Y.dtype.element_ty), mask=here)
