"""Mamba-1, backward for the input alone: the adjoint state walks from the end, and no state is needed.

    g_t = C_t dy_t + dstates_t + exp(dt_{t+1} A) g_{t+1}        (g: gradient to the state that is read out)
    g_t <- scale g_t                                            at edited positions, dadd = g_t before that
    dx_t = dt_t (B_t g_t) + D dy_t,      dh0 = exp(dt_1 A) g_1

With SOFTPLUS, DT holds what goes into dt = softplus(.); with Z, DY is the gradient to y silu(z), and dy = DY silu(z).

This is all that attribution with frozen dt, A, B, C needs. The same kernel with WRITE_DX false finds what each chunk
adds to the adjoint and by how much it shrinks what comes in from its right, so that chunks can run side by side.

Blocks, events and the sharing of work are those of `mamba1_forward`, from the last block to the first.
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
    tile,
    unstack,
)


@triton.jit
def load_adjoint_block(
    DY, DT, B, C, Z, row, steps, e, n,
    E: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, WRITE_DX: tl.constexpr,
):  # fmt: skip
    """Rows of B and C of one block; of dy and dt too, or their tiles if something is still to be applied to them."""
    if SOFTPLUS:
        dts = tile(DT + row * dt_row, dt_row, e, steps, T, EVEN)
    else:
        dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
    zs = steps
    if Z is not None:
        dys = tile(DY + row * E, E, e, steps, T, EVEN)
        zs = tile(Z + row * z_row, z_row, e, steps, T, EVEN)
    else:
        dys = rows(DY + row * E + e, E, steps, T, EVEN)
    Cs = rows(C + row * N + n, N, steps, T, EVEN)
    Bs = Cs
    if WRITE_DX:
        Bs = rows(B + row * N + n, N, steps, T, EVEN)
    return dys, dts, Bs, Cs, zs


@triton.jit
def mamba1_adjoint(
    DY, DT, A, B, C, D, Z, INCOMING, DSTATES, SCALE, TABLE,
    DX, DADD, OUTGOING, DECAY,
    L, n_blocks, n_chunks, chunk_blocks, n_edits, n_states,
    E: tl.constexpr, N: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, BE: tl.constexpr, T: tl.constexpr,
    EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr, WRITE_DX: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Grid: channel blocks x chunks (1, if not SPLIT) x batch, flattened, channels fastest.

    INCOMING: gradient to the state at the end, b E N, or at the end of each chunk, b n_chunks E N, if SPLIT; None
    for zeros. OUTGOING: gradient to the state at the start, the same shape.
    """
    columns: tl.constexpr = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    sequence = pid // columns
    at_edge = sequence.to(tl.int64) * (E * N)
    first_chunk = 0
    last_chunk = n_chunks
    if SPLIT:
        first_chunk = sequence % n_chunks
        last_chunk = first_chunk + 1
        sequence = sequence // n_chunks
    b = sequence.to(tl.int64)

    e_all = (pid % columns) * BE + tl.arange(0, BE)
    inside = e_all < E
    e = e_all if E % BE == 0 else tl.minimum(e_all, E - 1)
    n = tl.arange(0, N)
    en = e[:, None] * N + n[None, :]
    stored = inside[:, None] & (n >= 0)[None, :]

    a2 = tl.load(A + en) * LOG2_E
    ag = tl.zeros((BE, N), tl.float32)
    if INCOMING is not None:
        ag = tl.load(INCOMING + at_edge + en)
    d = tl.zeros((BE,), tl.float32)
    if D is not None:
        d = tl.load(D + e)
    dt_sum = tl.zeros((BE,), tl.float32)
    kept = tl.full((BE, N), 1.0, tl.float32)

    first_block = first_chunk * chunk_blocks
    last_block = tl.minimum(last_chunk * chunk_blocks, n_blocks)
    begin, steps = block_bounds(TABLE, last_block - 1, L, T)
    dys, dts, Bs, Cs, zs = load_adjoint_block(
        DY, DT, B, C, Z, b * L + begin, steps, e, n, E, dt_row, z_row, N, T, EVEN, SOFTPLUS, WRITE_DX
    )
    for back in range(last_block - first_block):
        block = last_block - 1 - back
        # Before the next rows are asked for: no load moves past the barriers of what is done here.
        steps_of_block = unstack(softplus_of_block(dts, steps, T, EVEN), BE, T) if SOFTPLUS else dts
        gradients = unstack(dys * zs * sigmoid(zs), BE, T) if Z is not None else dys
        next_begin, next_steps = block_bounds(TABLE, tl.maximum(block - 1, 0), L, T)
        next_dys, next_dts, next_Bs, next_Cs, next_zs = load_adjoint_block(
            DY, DT, B, C, Z, b * L + next_begin, next_steps, e, n, E, dt_row, z_row, N, T, EVEN, SOFTPLUS, WRITE_DX
        )
        row = b * L + begin
        for u in tl.static_range(T - 1, -1, -1):
            dy, dt = gradients[u], steps_of_block[u]
            g = dy[:, None] * Cs[u][None, :] + ag
            if DENSE:
                at = (row + u) * (E * N) + en
                g += tl.load(DSTATES + at, mask=stored if EVEN else stored & (u < steps), other=0.0)
            if u == 0 and TABLE is not None:
                edit, save = block_event(TABLE, block)
                if DSTATES is not None and not DENSE:
                    if save >= 0:
                        g += tl.load(DSTATES + (b * n_states + save) * (E * N) + en)
                if edit >= 0:
                    at = (b * n_edits + edit) * (E * N) + en
                    if DADD is not None:
                        tl.store(DADD + at, g, mask=stored)
                    if SCALE is not None:
                        scale = tl.load(SCALE + at)
                        g *= scale
                        if not WRITE_DX:
                            kept *= scale
            if WRITE_DX:
                dx = tl.sum(g * Bs[u][None, :], 1) * dt + d * dy
                at_x = DX + (row + u) * E + e_all
                tl.store(at_x, dx.to(DX.dtype.element_ty), mask=inside if EVEN else inside & (u < steps))
            else:
                dt_sum += dt
            ag = tl.exp2(dt[:, None] * a2) * g
        begin, steps = next_begin, next_steps
        dys, dts, Bs, Cs, zs = next_dys, next_dts, next_Bs, next_Cs, next_zs
    if WRITE_DX:
        if OUTGOING is not None:
            if first_chunk == 0:
                tl.store(OUTGOING + b * (E * N) + en, ag, mask=stored)
    else:
        tl.store(OUTGOING + at_edge + en, ag, mask=stored)
        tl.store(DECAY + at_edge + en, kept * tl.exp2(dt_sum[:, None] * a2), mask=stored)
