"""Mamba-1, forward: the state stays in registers and walks along the sequence.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        (Gu & Dao 2023, equations 2a and 4)
    h_t <- scale h_t + add                          at edited positions
    y_t = C_t h_t + D x_t                           (equation 2b)

With SOFTPLUS, DT holds what goes into dt = softplus(.); with Z, the gate follows: Y = y silu(z). Both are computed on
a block at a time, a number in one lane: within the walk every lane of a channel would repeat them.

One program, one warp, holds the state of BE channels (BE x N numbers) and goes through blocks of at most T positions,
unrolled; the rows of the next block are on their way while this one is worked on. A block begins at every multiple
of T and at every position with an event (an edit, a state to save), so that an event is always the first step of its
block and the other steps know nothing of it. Blocks make up chunks; the state at the start of each chunk may be
saved, for the backward.

If there are too few channels to fill the device, programs share out the chunks: a first pass finds what each chunk
adds to a state of zero and by how much it shrinks what comes in (READ_OUT false), `join_chunks` makes of that the
state at the start of each chunk, and a second pass reads out.

A step past the end of a short block is a step with dt = 0: it leaves the state as it is.
"""
# ruff: noqa: SIM102  (a condition known when compiling and one known when running do not combine)

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.triton_device import (
    LOG2_E,
    block_bounds,
    block_event,
    rows,
    sigmoid,
    softplus_of_block,
    stack,
    tile,
    unstack,
)


@triton.jit
def load_forward_block(
    X, DT, B, C, Z, row, steps, e, n,
    x_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, READ_OUT: tl.constexpr,
):  # fmt: skip
    """Rows of x, B and C of one block; dt as rows, or as a tile if softplus is to come; the tile of z."""
    xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
    if SOFTPLUS:
        dts = tile(DT + row * dt_row, dt_row, e, steps, T, EVEN)
    else:
        dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
    zs = steps
    if Z is not None:
        zs = tile(Z + row * z_row, z_row, e, steps, T, EVEN)
    Bs = rows(B + row * N + n, N, steps, T, EVEN)
    Cs = Bs
    if READ_OUT:
        Cs = rows(C + row * N + n, N, steps, T, EVEN)
    return xs, dts, Bs, Cs, zs


@triton.jit
def mamba1_forward(
    X, DT, A, B, C, D, Z, START, SCALE, ADD, TABLE,
    Y, CHUNK_STARTS, END, DECAY, STATES,
    L, n_blocks, n_chunks, chunk_blocks, n_edits, n_states,
    E: tl.constexpr, N: tl.constexpr, x_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, BE: tl.constexpr,
    T: tl.constexpr, EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, READ_OUT: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Grid: channel blocks x chunks (1, if not SPLIT) x batch, flattened, channels fastest.

    X, DT, Z: b L E with rows x_row, dt_row, z_row apart; B, C: b L N, float32, N a power of two. START: b n_chunks E N
    if SPLIT, else b E N; None for zeros. DENSE: the state is saved at every position, without a table.
    """
    columns: tl.constexpr = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    sequence = pid // columns
    at_start = sequence.to(tl.int64) * (E * N)
    first_chunk = 0
    last_chunk = n_chunks
    if SPLIT:
        first_chunk = sequence % n_chunks
        last_chunk = first_chunk + 1
        sequence = sequence // n_chunks
    b = sequence.to(tl.int64)

    e_all = (pid % columns) * BE + tl.arange(0, BE)
    inside = e_all < E
    e = e_all if E % BE == 0 else tl.minimum(e_all, E - 1)  # channels past the end repeat the last, are not stored
    n = tl.arange(0, N)
    en = e[:, None] * N + n[None, :]
    stored = inside[:, None] & (n >= 0)[None, :]

    a2 = tl.load(A + en) * LOG2_E
    h = tl.zeros((BE, N), tl.float32)
    if START is not None:
        h = tl.load(START + at_start + en)
    d = tl.zeros((BE,), tl.float32)
    if D is not None:
        d = tl.load(D + e)
    dt_sum = tl.zeros((BE,), tl.float32)
    kept = tl.full((BE, N), 1.0, tl.float32)

    begin, steps = block_bounds(TABLE, first_chunk * chunk_blocks, L, T)
    xs, dts, Bs, Cs, zs = load_forward_block(
        X, DT, B, C, Z, b * L + begin, steps, e, n, x_row, dt_row, z_row, N, T, EVEN, SOFTPLUS, READ_OUT
    )
    first_block = first_chunk * chunk_blocks
    for block in range(first_block, tl.minimum(last_chunk * chunk_blocks, n_blocks)):
        if CHUNK_STARTS is not None:
            if block % chunk_blocks == 0:
                at = (b * n_chunks + block // chunk_blocks) * (E * N) + en
                tl.store(CHUNK_STARTS + at, h, mask=stored)
        # Before the next rows are asked for: no load moves past the barriers of what is done here.
        steps_of_block = unstack(softplus_of_block(dts, steps, T, EVEN), BE, T) if SOFTPLUS else dts
        next_begin, next_steps = block_bounds(TABLE, tl.minimum(block + 1, n_blocks - 1), L, T)
        next_xs, next_dts, next_Bs, next_Cs, next_zs = load_forward_block(
            X, DT, B, C, Z, b * L + next_begin, next_steps, e, n, x_row, dt_row, z_row, N, T, EVEN, SOFTPLUS, READ_OUT
        )
        row = b * L + begin
        ys = ()
        for u in tl.static_range(T):
            x, dt = xs[u], steps_of_block[u]
            h = tl.exp2(dt[:, None] * a2) * h + (dt * x)[:, None] * Bs[u][None, :]
            if not READ_OUT:
                dt_sum += dt
            if u == 0 and TABLE is not None:
                edit, save = block_event(TABLE, block)
                if edit >= 0:
                    at = (b * n_edits + edit) * (E * N) + en
                    if SCALE is not None:
                        scale = tl.load(SCALE + at)
                        h *= scale
                        if not READ_OUT:
                            kept *= scale
                    if ADD is not None:
                        h += tl.load(ADD + at)
                if READ_OUT and STATES is not None and not DENSE:
                    if save >= 0:
                        tl.store(STATES + (b * n_states + save) * (E * N) + en, h, mask=stored)
            if READ_OUT:
                if DENSE:
                    tl.store(STATES + (row + u) * (E * N) + en, h, mask=stored if EVEN else stored & (u < steps))
                y = tl.sum(h * Cs[u][None, :], 1) + d * x
                if Z is not None:
                    ys = ys + (y,)  # type: ignore[assignment]  # see `rows`
                else:
                    here = inside if EVEN else inside & (u < steps)
                    tl.store(Y + (row + u) * E + e_all, y.to(Y.dtype.element_ty), mask=here)
        if READ_OUT and Z is not None:
            t = tl.arange(0, T)
            gated = stack(ys, BE, T) * zs * sigmoid(zs)
            here = inside[:, None] & (t < steps)[None, :]
            tl.store(Y + (row + t)[None, :] * E + e_all[:, None], gated.to(Y.dtype.element_ty), mask=here)
        begin, steps = next_begin, next_steps
        xs, dts, Bs, Cs, zs = next_xs, next_dts, next_Bs, next_Cs, next_zs
    if READ_OUT:
        if last_chunk == n_chunks:
            tl.store(END + b * (E * N) + en, h, mask=stored)
    else:
        tl.store(END + at_start + en, h, mask=stored)
        tl.store(DECAY + at_start + en, kept * tl.exp2(dt_sum[:, None] * a2), mask=stored)
