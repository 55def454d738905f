"""Mamba-1, backward for everything: states computed again a block at a time, and kept in registers.

With g_t the gradient to the state that is read out at t (see `mamba1_adjoint`), p_t = exp(dt_t A) h_{t-1} and
w_t = g_t p_t:

    dx = dt (B g) + D dy         dB = sum_E g dt x         dadd = g      (at edits: g before its scaling,
    ddt = x (B g) + sum_N w A    dC = sum_E h dy           dscale = g h   h before its edit)
    dA = sum_{b,l} w dt          dD = sum_{b,l} dy x       dh0 = exp(dt_1 A) g_1

One program, one warp, takes BE channels (16 numbers of the state per lane: sums over N and over E are then cheap)
through one chunk, twice:
    1. forward from the state at the chunk's start, leaving the state at the start of each block in scratch,
    2. backward over the blocks: forward through the block once more, keeping its p_t in registers, then its adjoint.
Chunks run side by side; `mamba1_adjoint` and `join_chunks` have found the adjoint that enters each from the right.

Nothing is added atomically, so results repeat bit for bit: sums over E and over chunks are written as one part per
program and added up afterwards.
"""
# ruff: noqa: SIM102  (a condition known when compiling and one known when running do not combine)

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.triton.device import LN_2, LOG2_E, block_bounds, block_event, rows


@triton.jit
def edited(h, SCALE, ADD, at):
    """The state after the edit stored at `at`."""
    if SCALE is not None:
        h *= tl.load(SCALE + at)
    if ADD is not None:
        h += tl.load(ADD + at)
    return h


@triton.jit
def mamba1_backward(
    X, DT, A, B, C, D, CHUNK_STARTS, SCALE, ADD, TABLE, DY, INCOMING, DSTATES, STARTS,
    DX, DDT, DA, DB, DC, DD, DH0, DSCALE, DADD,
    L, n_blocks, n_chunks, chunk_blocks, n_edits, n_states, n_rows,
    E: tl.constexpr, N: tl.constexpr, x_row: tl.constexpr, dt_row: tl.constexpr, BE: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Grid: channel blocks x chunks x batch, flattened, channels fastest.

    CHUNK_STARTS: b n_chunks E N. INCOMING: gradient to the state at the end of each chunk, the same shape, or None
    for zeros. STARTS: scratch, b n_blocks E N. DA: b n_chunks E N, DD: b n_chunks E, DB and DC: columns b l N; their
    sums over the leading axes are the gradients.
    """
    columns: tl.constexpr = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    sequence = pid // columns
    at_chunk = sequence.to(tl.int64) * (E * N)
    chunk = sequence % n_chunks
    b = (sequence // n_chunks).to(tl.int64)

    e_all = (pid % columns) * BE + tl.arange(0, BE)
    inside = e_all < E
    e = e_all if E % BE == 0 else tl.minimum(e_all, E - 1)
    n = tl.arange(0, N)
    en = e[:, None] * N + n[None, :]
    stored = inside[:, None] & (n >= 0)[None, :]

    a2 = tl.load(A + en) * LOG2_E
    first_block = chunk * chunk_blocks
    last_block = tl.minimum(first_block + chunk_blocks, n_blocks)

    h = tl.load(CHUNK_STARTS + at_chunk + en)
    for block in range(first_block, last_block):
        tl.store(STARTS + (b * n_blocks + block) * (E * N) + en, h, mask=stored)
        begin, steps = block_bounds(TABLE, block, L, T)
        row = b * L + begin
        xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
        dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
        Bs = rows(B + row * N + n, N, steps, T, EVEN)
        for u in tl.static_range(T):
            h = tl.exp2(dts[u][:, None] * a2) * h + (dts[u] * xs[u])[:, None] * Bs[u][None, :]
            if u == 0 and TABLE is not None:
                edit, save = block_event(TABLE, block)
                if edit >= 0:
                    h = edited(h, SCALE, ADD, (b * n_edits + edit) * (E * N) + en)
    tl.debug_barrier()  # what one lane has left in STARTS another may read

    ag = tl.zeros((BE, N), tl.float32)
    if INCOMING is not None:
        ag = tl.load(INCOMING + at_chunk + en, mask=stored, other=0.0)
    d = tl.zeros((BE,), tl.float32)
    if D is not None:
        d = tl.load(D + e)
    dA = tl.zeros((BE, N), tl.float32)
    dD = tl.zeros((BE,), tl.float32)
    part = (pid % columns).to(tl.int64) * n_rows

    for back in range(last_block - first_block):
        block = last_block - 1 - back
        begin, steps = block_bounds(TABLE, block, L, T)
        row = b * L + begin
        h = tl.load(STARTS + (b * n_blocks + block) * (E * N) + en)
        xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
        dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
        Bs = rows(B + row * N + n, N, steps, T, EVEN)
        ps = ()
        for u in tl.static_range(T):
            p = tl.exp2(dts[u][:, None] * a2) * h
            ps = ps + (p,)  # type: ignore[assignment]  # see `rows`
            h = p + (dts[u] * xs[u])[:, None] * Bs[u][None, :]
            if u == 0 and TABLE is not None:
                edit, save = block_event(TABLE, block)
                if edit >= 0:
                    h = edited(h, SCALE, ADD, (b * n_edits + edit) * (E * N) + en)
        # Rows are read again, from the cache: kept, they and exp(dt A) would push the p_t out of the registers.
        tl.debug_barrier()
        xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
        dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
        Bs = rows(B + row * N + n, N, steps, T, EVEN)
        Cs = rows(C + row * N + n, N, steps, T, EVEN)
        dys = rows(DY + row * E + e, E, steps, T, EVEN)
        for u in tl.static_range(T - 1, -1, -1):
            x, dt, dy = xs[u], dts[u], dys[u]
            if E % BE != 0:
                dy = tl.where(inside, dy, 0.0)
            dtx = dt * x
            g = dy[:, None] * Cs[u][None, :] + ag
            h = ps[u] + dtx[:, None] * Bs[u][None, :]
            if DENSE:
                at = (row + u) * (E * N) + en
                g += tl.load(DSTATES + at, mask=stored if EVEN else stored & (u < steps), other=0.0)
            if u == 0 and TABLE is not None:
                edit, save = block_event(TABLE, block)
                if DSTATES is not None and not DENSE:
                    if save >= 0:
                        at = (b * n_states + save) * (E * N) + en
                        g += tl.load(DSTATES + at, mask=stored, other=0.0)
                if edit >= 0:
                    at = (b * n_edits + edit) * (E * N) + en
                    if DADD is not None:
                        tl.store(DADD + at, g, mask=stored)
                    if DSCALE is not None:
                        tl.store(DSCALE + at, g * h, mask=stored)
                    h = edited(h, SCALE, ADD, at)
                    if SCALE is not None:
                        g *= tl.load(SCALE + at)
            w_t = g * ps[u]
            gB = tl.sum(g * Bs[u][None, :], 1)
            dA += w_t * dt[:, None]
            dD += dy * x
            here = inside if EVEN else inside & (u < steps)
            tl.store(DX + (row + u) * E + e_all, (gB * dt + d * dy).to(DX.dtype.element_ty), mask=here)
            ddt = gB * x + tl.sum(w_t * a2, 1) * LN_2
            tl.store(DDT + (row + u) * E + e_all, ddt.to(DDT.dtype.element_ty), mask=here)
            at_n = (part + row + u) * N + n
            here_n = n >= 0 if EVEN else (n >= 0) & (u < steps)
            tl.store(DB + at_n, tl.sum(g * dtx[:, None], 0), mask=here_n)
            tl.store(DC + at_n, tl.sum(h * dy[:, None], 0), mask=here_n)
            ag = tl.exp2(dt[:, None] * a2) * g
    tl.store(DA + at_chunk + en, dA, mask=stored)
    tl.store(DD + sequence.to(tl.int64) * E + e_all, dD, mask=inside)
    if DH0 is not None:
        if chunk == 0:
            tl.store(DH0 + b * (E * N) + en, ag, mask=stored)
