"""Mamba-2: what each chunk adds to the state, and the states that enter the chunks.

Inside a chunk, with cum_t = sum_{s<=t} dt_s A (Dao & Gu 2024, section 6; per head, h is P x N):

    part = sum_s exp(cum_last - cum_s) dt_s x_s B_s^T                        `ssd_outer`, a matrix product
    h_out = exp(cum_last) h_in + part,  then h_out <- scale h_out + add      `ssd_pass`, chunk after chunk
                                        where an edit ends the chunk

The same two kernels run the adjoint: part = sum_t exp(cum_t) dy_t C_t^T, passed from the last chunk to the first.
Decays are kept as powers of two: cum is in units of log 2.
"""
# ruff: noqa: SIM102  (a condition known when compiling and one known when running do not combine)

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.triton_device import LOG2_E, block_bounds, block_event


@triton.jit
def chunk_decays(DT, A, b, head, begin, steps, L, H, Q: tl.constexpr):
    """dt, cum and its last value for a chunk of one head; dt = 0 past the end of the chunk."""
    q = tl.arange(0, Q)
    dt = tl.load(DT + (b * L + begin + q) * H + head, mask=q < steps, other=0.0)
    log_decay = dt * (tl.load(A + head) * LOG2_E)
    return dt, tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)


@triton.jit
def ssd_outer(
    V, K, DT, A, TABLE, OUT, DECAY,
    L, H, P, N, v_row, k_row, n_chunks, per_group,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    INTO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = sum_q w_q V_q K_q^T, with w = exp(cum_last - cum) dt, or w = exp(cum) if INTO.

    V: b L H P, K: b L G N, OUT: b n_chunks H P N, DECAY: b n_chunks H, exp(cum_last), or None.
    Grid: blocks of N x blocks of P x heads x chunks x batch, flattened, N fastest.
    """
    n_blocks, p_blocks = tl.cdiv(N, BN), tl.cdiv(P, BP)
    pid = tl.program_id(0)
    n_block, pid = pid % n_blocks, pid // n_blocks
    p_block, pid = pid % p_blocks, pid // p_blocks
    head, pid = pid % H, pid // H
    chunk = pid % n_chunks
    b = (pid // n_chunks).to(tl.int64)

    begin, steps = block_bounds(TABLE, chunk, L, Q)
    dt, cum, last = chunk_decays(DT, A, b, head, begin, steps, L, H, Q)
    weight = tl.exp2(cum) if INTO else tl.exp2(last - cum) * dt
    q = tl.arange(0, Q)
    p = p_block * BP + tl.arange(0, BP)
    n = n_block * BN + tl.arange(0, BN)
    row = (b * L + begin + q)[:, None]
    valid = (q < steps)[:, None]
    v = tl.load(V + row * v_row + head * P + p[None, :], mask=valid & (p < P)[None, :], other=0.0)
    k = tl.load(K + row * k_row + (head // per_group) * N + n[None, :], mask=valid & (n < N)[None, :], other=0.0)
    v = (v.to(tl.float32) * weight[:, None]).to(DOT)
    out = tl.dot(tl.trans(v), k.to(DOT), input_precision=PRECISION)
    at = ((b * n_chunks + chunk) * H + head) * P * N + p[:, None] * N + n[None, :]
    tl.store(OUT + at, out, mask=(p < P)[:, None] & (n < N)[None, :])
    if DECAY is not None:
        if (n_block == 0) & (p_block == 0):
            tl.store(DECAY + (b * n_chunks + chunk) * H + head, tl.exp2(last))


@triton.jit
def ssd_pass(
    PART, DECAY, FIRST, SCALE, ADD, GIVEN, TABLE,
    AT_EDGE, LAST, STATES, BEFORE_EDIT, DADD,
    H, size, n_chunks, n_edits, n_states,
    LANES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Carry the state (P N = size numbers per head) over the chunks, elementwise.

    Forward: AT_EDGE is the state that enters each chunk; STATES takes those asked for, BEFORE_EDIT those not yet
    scaled. REVERSE: AT_EDGE is the gradient to the state that leaves each chunk, before its edit; GIVEN holds the
    gradients to STATES.
    Grid: blocks of LANES numbers x heads x batch, flattened.
    """
    columns = tl.cdiv(size, LANES)
    pid = tl.program_id(0)
    i = (pid % columns) * LANES + tl.arange(0, LANES)
    inside = i < size
    head = (pid // columns) % H
    b = (pid // columns // H).to(tl.int64)
    state = tl.zeros((LANES,), tl.float32)
    if FIRST is not None:
        state = tl.load(FIRST + (b * H + head) * size + i, mask=inside, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step if REVERSE else step
        at_decay = (b * n_chunks + chunk) * H + head
        at = at_decay * size + i
        part = tl.load(PART + at, mask=inside, other=0.0)
        decay = tl.load(DECAY + at_decay)
        if not REVERSE:
            tl.store(AT_EDGE + at, state.to(AT_EDGE.dtype.element_ty), mask=inside)
            state = decay * state + part
        if TABLE is not None:
            edit, save = block_event(TABLE, chunk)
            at_edit = ((b * n_edits + edit) * H + head) * size + i
            at_save = ((b * n_states + save) * H + head) * size + i
            if REVERSE and GIVEN is not None:
                if save >= 0:
                    state += tl.load(GIVEN + at_save, mask=inside, other=0.0)
            if edit >= 0:
                if BEFORE_EDIT is not None:
                    tl.store(BEFORE_EDIT + at_edit, state, mask=inside)
                if DADD is not None:
                    tl.store(DADD + at_edit, state, mask=inside)
                if SCALE is not None:
                    state *= tl.load(SCALE + at_edit, mask=inside, other=0.0)
                if ADD is not None:
                    state += tl.load(ADD + at_edit, mask=inside, other=0.0)
            if not REVERSE and STATES is not None:
                if save >= 0:
                    tl.store(STATES + at_save, state, mask=inside)
        if REVERSE:
            tl.store(AT_EDGE + at, state.to(AT_EDGE.dtype.element_ty), mask=inside)
            state = decay * state + part
    tl.store(LAST + (b * H + head) * size + i, state, mask=inside)
