"""Mamba-2, backward inside the chunks.

With u_s = dt_s x_s, L_ts = exp(cum_t - cum_s) for s <= t, tail_s = exp(cum_last - cum_s), G the gradient to the state
that leaves the chunk and h_in the one that enters it (`mamba2_states` has found both), per head:

    du_s = sum_t CB_ts L_ts dy_t + tail_s G B_s        dx = dt du + D dy,    ddt = x . du + A drun,   dA = sum dt drun
    dcum_t = sum_s Z_ts - sum_s Z_st                   Z_ts = CB_ts L_ts (dy_t . u_s)
             + exp(cum_t) dy_t . h_in C_t - v_t        v_s = tail_s u_s . G B_s
    dcum_last += sum_s v_s + exp(cum_last) G . h_in    drun_s = sum_{t>=s} dcum_t

and per group, summed over its heads, with K_ts = L_ts (dy_t . u_s):

    dC_t = sum_s K_ts B_s + exp(cum_t) h_in^T dy_t     dB_s = sum_t K_ts C_t + tail_s G^T u_s

Nothing is added atomically: sums over heads run inside a program, sums over blocks of P and over parts of a group
are written side by side and added up afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.ssd._triton_states import chunk_decays
from hooked_mamba.ops.triton_device import block_bounds


@triton.jit
def ssd_backward_x(
    X, DT, A, B, C, D, CB, H_IN, G_OUT, DY, TABLE,
    DX, DDT, DA, DD,
    L, H, P, N, x_row, b_row, c_row, n_chunks, per_group, n_rows,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, FROZEN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients to x, dt, A and D; FROZEN: to x alone.

    Grid: blocks of P x heads x chunks x batch, flattened. DDT: blocks of P, b L H; DA, DD: blocks of P, b n_chunks H.
    """
    p_blocks = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    p_block, pid = pid % p_blocks, pid // p_blocks
    head, pid = pid % H, pid // H
    chunk = pid % n_chunks
    b = (pid // n_chunks).to(tl.int64)
    group = head // per_group

    begin, steps = block_bounds(TABLE, chunk, L, Q)
    dt, cum, last = chunk_decays(DT, A, b, head, begin, steps, L, H, Q)
    q = tl.arange(0, Q)
    p = p_block * BP + tl.arange(0, BP)
    row = (b * L + begin + q)[:, None]
    valid = (q < steps)[:, None]
    here = valid & (p < P)[None, :]
    tail = tl.exp2(last - cum)
    at_state = ((b * n_chunks + chunk) * H + head) * P * N
    dy = tl.load(DY + (row * H + head) * P + p[None, :], mask=here, other=0.0).to(tl.float32)

    du = tl.zeros((Q, BP), tl.float32)
    read = tl.zeros((Q, BP), tl.float32)  # h_in C_t
    overlap = 0.0  # G . h_in
    for n_block in range(tl.cdiv(N, BN)):
        n = n_block * BN + tl.arange(0, BN)
        at = at_state + p[:, None] * N + n[None, :]
        inside = (p < P)[:, None] & (n < N)[None, :]
        Bt = tl.load(B + row * b_row + group * N + n[None, :], mask=valid & (n < N)[None, :], other=0.0)
        g = tl.load(G_OUT + at, mask=inside, other=0.0)
        du = tl.dot(Bt.to(DOT), tl.trans(g.to(DOT)), du, input_precision=PRECISION)
        if not FROZEN:
            Ct = tl.load(C + row * c_row + group * N + n[None, :], mask=valid & (n < N)[None, :], other=0.0)
            h = tl.load(H_IN + at, mask=inside, other=0.0)
            read = tl.dot(Ct.to(DOT), tl.trans(h.to(DOT)), read, input_precision=PRECISION)
            overlap += tl.sum(tl.sum(g.to(tl.float32) * h.to(tl.float32), 1), 0)
    du *= tail[:, None]

    at_gram = ((b * n_chunks + chunk) * (H // per_group) + group) * Q * Q
    gram = tl.load(CB + at_gram + q[:, None] * Q + q[None, :])
    causal = q[:, None] >= q[None, :]
    mix = gram * tl.exp2(tl.where(causal, cum[:, None] - cum[None, :], float("-inf")))
    x = tl.load(X + row * x_row + head * P + p[None, :], mask=here, other=0.0).to(tl.float32)
    if not FROZEN:
        u = x * dt[:, None]
        v = tl.sum(u * du, 1)
        z = mix * tl.dot(dy.to(DOT), tl.trans(u.to(DOT)), input_precision=PRECISION)
        dcum = tl.sum(z, 1) - tl.sum(z, 0) + tl.exp2(cum) * tl.sum(dy * read, 1) - v
        from_last = tl.sum(v, 0) + tl.exp2(last) * overlap  # cum_last holds every step of the chunk
    du = tl.dot(tl.trans(mix.to(DOT)), dy.to(DOT), du, input_precision=PRECISION)
    dx = du * dt[:, None]
    if D is not None:
        dx += tl.load(D + head) * dy
    tl.store(DX + (row * H + head) * P + p[None, :], dx.to(DX.dtype.element_ty), mask=here)
    if not FROZEN:
        drun = tl.cumsum(dcum, 0, reverse=True) + from_last
        ddt = tl.sum(x * du, 1) + tl.load(A + head) * drun
        at = p_block.to(tl.int64) * n_rows + b * L + begin + q
        tl.store(DDT + at * H + head, ddt, mask=q < steps)
        at = (p_block.to(tl.int64) * (n_rows // L) + b) * n_chunks + chunk
        tl.store(DA + at * H + head, tl.sum(dt * drun, 0))
        tl.store(DD + at * H + head, tl.sum(tl.sum(dy * x, 1), 0))


@triton.jit
def ssd_backward_gram(
    X, DT, A, DY, TABLE, K,
    L, H, P, x_row, n_chunks, per_group, per_part, n_gram,
    Q: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K, the gradient to C B^T, summed over per_part heads of a group: parts, b n_chunks G Q Q (n_gram numbers).

    Grid: parts of a group x groups x chunks x batch, flattened.
    """
    parts, groups = tl.cdiv(per_group, per_part), H // per_group
    pid = tl.program_id(0)
    part, pid = pid % parts, pid // parts
    group, pid = pid % groups, pid // groups
    chunk = pid % n_chunks
    b = (pid // n_chunks).to(tl.int64)

    begin, steps = block_bounds(TABLE, chunk, L, Q)
    q = tl.arange(0, Q)
    row = (b * L + begin + q)[:, None]
    valid = (q < steps)[:, None]
    causal = q[:, None] >= q[None, :]
    k = tl.zeros((Q, Q), tl.float32)
    first = group * per_group + part * per_part
    for head in range(first, tl.minimum(first + per_part, (group + 1) * per_group)):
        dt, cum, _ = chunk_decays(DT, A, b, head, begin, steps, L, H, Q)
        decay = tl.exp2(tl.where(causal, cum[:, None] - cum[None, :], float("-inf")))
        for p_block in range(tl.cdiv(P, BP)):
            p = p_block * BP + tl.arange(0, BP)
            here = valid & (p < P)[None, :]
            dy = tl.load(DY + (row * H + head) * P + p[None, :], mask=here, other=0.0)
            u = tl.load(X + row * x_row + head * P + p[None, :], mask=here, other=0.0).to(tl.float32) * dt[:, None]
            k += decay * tl.dot(dy.to(DOT), tl.trans(u.to(DOT)), input_precision=PRECISION)
    at = part.to(tl.int64) * n_gram + ((b * n_chunks + chunk) * groups + group) * Q * Q
    tl.store(K + at + q[:, None] * Q + q[None, :], k)


@triton.jit
def ssd_backward_bc(
    X, DT, A, B, C, K, H_IN, G_OUT, DY, TABLE, DB, DC,
    L, H, P, N, x_row, b_row, c_row, n_chunks, per_group, per_part, n_rows,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients to B and C, summed over per_part heads of a group; DB, DC: parts, b L G N.

    Grid: blocks of N x parts of a group x groups x chunks x batch, flattened.
    """
    n_blocks, parts, groups = tl.cdiv(N, BN), tl.cdiv(per_group, per_part), H // per_group
    pid = tl.program_id(0)
    n_block, pid = pid % n_blocks, pid // n_blocks
    part, pid = pid % parts, pid // parts
    group, pid = pid % groups, pid // groups
    chunk = pid % n_chunks
    b = (pid // n_chunks).to(tl.int64)

    begin, steps = block_bounds(TABLE, chunk, L, Q)
    q = tl.arange(0, Q)
    n = n_block * BN + tl.arange(0, BN)
    row = (b * L + begin + q)[:, None]
    valid = (q < steps)[:, None]
    here_n = valid & (n < N)[None, :]
    dB = tl.zeros((Q, BN), tl.float32)
    dC = tl.zeros((Q, BN), tl.float32)
    if part == 0:
        at = ((b * n_chunks + chunk) * groups + group) * Q * Q
        k = tl.load(K + at + q[:, None] * Q + q[None, :]).to(DOT)
        Bt = tl.load(B + row * b_row + group * N + n[None, :], mask=here_n, other=0.0).to(DOT)
        dC = tl.dot(k, Bt, dC, input_precision=PRECISION)
        Ct = tl.load(C + row * c_row + group * N + n[None, :], mask=here_n, other=0.0).to(DOT)
        dB = tl.dot(tl.trans(k), Ct, dB, input_precision=PRECISION)
    first = group * per_group + part * per_part
    for head in range(first, tl.minimum(first + per_part, (group + 1) * per_group)):
        dt, cum, last = chunk_decays(DT, A, b, head, begin, steps, L, H, Q)
        tail = tl.exp2(last - cum) * dt
        into = tl.exp2(cum)
        at_state = ((b * n_chunks + chunk) * H + head) * P * N
        for p_block in range(tl.cdiv(P, BP)):
            p = p_block * BP + tl.arange(0, BP)
            here = valid & (p < P)[None, :]
            at = at_state + p[:, None] * N + n[None, :]
            inside = (p < P)[:, None] & (n < N)[None, :]
            dy = tl.load(DY + (row * H + head) * P + p[None, :], mask=here, other=0.0).to(tl.float32)
            h = tl.load(H_IN + at, mask=inside, other=0.0).to(DOT)
            dC = tl.dot((dy * into[:, None]).to(DOT), h, dC, input_precision=PRECISION)
            x = tl.load(X + row * x_row + head * P + p[None, :], mask=here, other=0.0).to(tl.float32)
            g = tl.load(G_OUT + at, mask=inside, other=0.0).to(DOT)
            dB = tl.dot((x * tail[:, None]).to(DOT), g, dB, input_precision=PRECISION)
    at = ((part.to(tl.int64) * n_rows + row) * groups + group) * N + n[None, :]
    tl.store(DB + at, dB, mask=here_n)
    tl.store(DC + at, dC, mask=here_n)
