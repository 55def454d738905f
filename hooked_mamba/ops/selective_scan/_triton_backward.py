"""Mamba-1, backward for everything: states computed again a block at a time, and kept in registers.

With g_t the gradient to the state before its edit (see `mamba1_adjoint`), ag_t = exp(dt_t A) g_t, w_t = ag_t h_{t-1}:

    dx = dt (B g) + D dy         dB = sum_E g dt x         dadd = gradient to the edited state,
    ddt = x (B g) + sum_N w A    dC = sum_E h dy           dscale = dadd times the state before its edit
    dA = sum_{b,l} w dt          dD = sum_{b,l} dy x       dh0 = ag_1

With SOFTPLUS, DT holds v, dt = softplus(v), and DDT becomes ddt sigmoid(v). With Z, DY is the gradient to y silu(z):

    dy = DY silu(z)              dz = DY (C h + D x) silu'(z)

An item of work is a chunk of BE channels (16 numbers of the state per lane), which a program, one warp, goes through
twice:
    1. forward from the state at the chunk's start, leaving the state at the start of each block in its scratch,
    2. backward over the blocks: forward through the block once more, keeping its states in registers, then its adjoint.
Items run side by side; `mamba1_adjoint` and `join_chunks` have found the adjoint that enters each from the right. There
are no more programs than a device holds: each takes one item after the other, and its scratch stays in the cache.

Nothing is added atomically, so results repeat bit for bit: sums over E and over chunks are written as one part per
program and added up afterwards.
"""
# ruff: noqa: SIM102  (a condition known when compiling and one known when running do not combine)

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.triton_device import (
    LN_2,
    LOG2_E,
    block_bounds,
    block_event,
    rows,
    sigmoid,
    softplus,
    sum_over_states,
    sums_over_channels,
    sums_over_states,
)


@triton.jit
def edited(h, SCALE, ADD, at):
    """The state after the edit stored at `at`."""
    if SCALE is not None:
        h *= tl.load(SCALE + at)
    if ADD is not None:
        h += tl.load(ADD + at)
    return h


@triton.jit
def step_size(v, u, steps, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
    """dt from a row of DT; 0 past the end of the block."""
    if SOFTPLUS:
        v = softplus(v)
        if not EVEN:
            v = tl.where(u < steps, v, 0.0)
    return v


@triton.jit
def mamba1_backward(
    X, DT, A, B, C, D, Z, CHUNK_STARTS, SCALE, ADD, TABLE, DY, INCOMING, DSTATES, STARTS,
    DX, DDT, DA, DBC, DD, DZ, DH0, DSCALE, DADD,
    L, n_blocks, n_chunks, chunk_blocks, n_edits, n_states, n_rows, n_items,
    E: tl.constexpr, N: tl.constexpr, x_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr,
    BE: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr, SOFTPLUS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs. Items: channel blocks x chunks x batch, flattened, channels fastest.

    CHUNK_STARTS: b n_chunks E N. INCOMING: gradient to the state at the end of each chunk, the same shape, or None
    for zeros. STARTS: scratch, programs chunk_blocks BE N. DA: b n_chunks F N, DD: b n_chunks F, DH0: b F N, with F
    the channels of all blocks, filled up; DBC: columns b l 2N, B before C. Sums over the leading axes of DA, DD and
    DBC are the gradients.
    """
    columns: tl.constexpr = tl.cdiv(E, BE)
    pid = tl.program_id(0)
    n = tl.arange(0, N)
    two_n = tl.arange(0, 2 * N)
    local = tl.arange(0, BE)[:, None] * N + n[None, :]
    mine = STARTS + pid.to(tl.int64) * chunk_blocks * (BE * N) + local
    for item in range(pid, n_items, tl.num_programs(0)):
        sequence = item // columns
        at_chunk = tl.cast(sequence, tl.int64) * (E * N)
        chunk = sequence % n_chunks
        b = tl.cast(sequence // n_chunks, tl.int64)

        e_all = (item % columns) * BE + tl.arange(0, BE)
        inside = e_all < E
        e = e_all if E % BE == 0 else tl.minimum(e_all, E - 1)
        en = e[:, None] * N + n[None, :]
        stored = inside[:, None] & (n >= 0)[None, :]

        a2 = tl.load(A + en) * LOG2_E
        first_block = chunk * chunk_blocks
        last_block = tl.minimum(first_block + chunk_blocks, n_blocks)

        h = tl.load(CHUNK_STARTS + at_chunk + en)
        tl.store(mine, h)
        for block in range(first_block, last_block - 1):
            begin, steps = block_bounds(TABLE, block, L, T)
            row = b * L + begin
            xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
            dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
            Bs = rows(B + row * N + n, N, steps, T, EVEN)
            for u in tl.static_range(T):
                dt = step_size(dts[u], u, steps, SOFTPLUS, EVEN)
                h = tl.exp2(dt[:, None] * a2) * h + (dt * xs[u])[:, None] * Bs[u][None, :]
                if u == 0 and TABLE is not None:
                    edit, save = block_event(TABLE, block)
                    if edit >= 0:
                        h = edited(h, SCALE, ADD, (b * n_edits + edit) * (E * N) + en)
            tl.store(mine + (block + 1 - first_block) * (BE * N), h)
        tl.debug_barrier()  # what one lane has left in STARTS another may read

        ag = tl.zeros((BE, N), tl.float32)
        if INCOMING is not None:
            ag = tl.load(INCOMING + at_chunk + en, mask=stored, other=0.0)
        d = tl.zeros((BE,), tl.float32)
        if D is not None:
            d = tl.load(D + e)
        dA = tl.zeros((BE, N), tl.float32)
        dD = tl.zeros((BE,), tl.float32)
        part = tl.cast(item % columns, tl.int64) * n_rows

        for back in range(last_block - first_block):
            block = last_block - 1 - back
            begin, steps = block_bounds(TABLE, block, L, T)
            row = b * L + begin
            h = tl.load(mine + (block - first_block) * (BE * N))
            xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
            dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
            Bs = rows(B + row * N + n, N, steps, T, EVEN)
            hs = (h,)
            for u in tl.static_range(T):
                dt = step_size(dts[u], u, steps, SOFTPLUS, EVEN)
                last_decay = tl.exp2(dt[:, None] * a2)
                h = last_decay * h + (dt * xs[u])[:, None] * Bs[u][None, :]
                if u == 0 and TABLE is not None:
                    edit, save = block_event(TABLE, block)
                    if edit >= 0:
                        h = edited(h, SCALE, ADD, (b * n_edits + edit) * (E * N) + en)
                hs = hs + (h,)  # type: ignore[assignment]  # see `rows`
            # Rows are read again, from the cache: kept, they and exp(dt A) would push the states out of the registers.
            tl.debug_barrier()
            xs = rows(X + row * x_row + e, x_row, steps, T, EVEN)
            dts = rows(DT + row * dt_row + e, dt_row, steps, T, EVEN)
            Bs = rows(B + row * N + n, N, steps, T, EVEN)
            Cs = rows(C + row * N + n, N, steps, T, EVEN)
            dys = rows(DY + row * E + e, E, steps, T, EVEN)
            for u in tl.static_range(T - 1, -1, -1):
                x, dt, dy, h = xs[u], step_size(dts[u], u, steps, SOFTPLUS, EVEN), dys[u], hs[u + 1]
                here = inside if EVEN else inside & (u < steps)
                at_e = (row + u) * E + e
                if E % BE != 0:
                    dy = tl.where(inside, dy, 0.0)
                if Z is not None:
                    z = tl.load(Z + (row + u) * z_row + e, mask=here, other=0.0).to(tl.float32)
                    gate = sigmoid(z)
                    y = sum_over_states(h * Cs[u][None, :], BE, N) + d * x
                    dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                    tl.store(DZ + at_e, dz.to(DZ.dtype.element_ty), mask=here)
                    dy *= z * gate
                dtx = dt * x
                # With a gate there are no registers in which to keep a decay from the way forward.
                decay = last_decay if u == T - 1 and Z is None else tl.exp2(dt[:, None] * a2)
                g = dy[:, None] * Cs[u][None, :] + ag
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
                            before = decay * hs[u] + dtx[:, None] * Bs[u][None, :]
                            tl.store(DSCALE + at, g * before, mask=stored)
                        if SCALE is not None:
                            g *= tl.load(SCALE + at)
                ag = decay * g
                w = ag * hs[u]
                gB, wA = sums_over_states(g * Bs[u][None, :], w * a2, BE, N)
                dA += w * dt[:, None]
                dD += dy * x
                tl.store(DX + at_e, (gB * dt + d * dy).to(DX.dtype.element_ty), mask=here)
                ddt = gB * x + wA * LN_2
                if SOFTPLUS:
                    ddt *= sigmoid(dts[u])
                tl.store(DDT + at_e, ddt.to(DDT.dtype.element_ty), mask=here)
                dBC = sums_over_channels(g * dtx[:, None], h * dy[:, None], BE, N)
                here_n = two_n >= 0 if EVEN else (two_n >= 0) & (u < steps)
                tl.store(DBC + (part + row + u) * (2 * N) + two_n, dBC, mask=here_n)
        tl.store(DA + tl.cast(item, tl.int64) * (BE * N) + local, dA)
        tl.store(DD + tl.cast(item, tl.int64) * BE + tl.arange(0, BE), dD)
        if DH0 is not None:
            if chunk == 0:
                tl.store(DH0 + (b * columns + item % columns) * (BE * N) + local, ag)
        tl.debug_barrier()  # the next item writes over what lanes have read in STARTS
