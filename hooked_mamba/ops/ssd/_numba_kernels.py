"""The kernels of Mamba-2's numba backend, position after position: forward, and all gradients.

With u = dt x and a decay per head, d = exp(dt A), the scan is (per head, h is P x N)
    h_t = d_t h_{t-1} + u_t B_t^T,      y_t = h_t C_t
Forward, a lane is a row of h: one unit of work is 16 rows of one head of one batch element, and two positions are done
each time the state is gone over. Backward, a lane is a column, so that sums over rows need no lanes to meet: one unit
is a head, with g the adjoint of its state. States are kept every T positions, and made again from there.
    g_t = dy_t C_t^T + dstates_t + d_{t+1} g_{t+1}
    du = g B,      dB = g^T u,      dC = h_t^T dy,      dd_t = <g_t, h_{t-1}>
All arrays are contiguous float32; P and N are multiples of 16. What is computed at a position does not depend on where
the sequence was cut.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from hooked_mamba.ops.numba_compile import kernel
from hooked_mamba.ops.numba_lanes import LANES, add, broadcast, fma, load, mul, splat, store, total
from hooked_mamba.ops.numba_packed import unpack

T = 32
"""Positions between the states that the backward starts from."""

ROWS = 4
"""Rows that the backward handles together: their sums stay in registers, and their states near."""

TILE = 16
"""Positions that the forward walks before it turns to the next rows: their numbers stay in the first cache."""

FEW = 8
"""Positions whose terms are summed in float32 before they are added in float64."""


@kernel
@no_type_check
def forward(x, dt, d, B, C, D, h, y, starts, states, positions, lo, hi):
    """y, the skip D x included, and, in place, the state h (b H P/16 N 16); states at every T positions if `starts` is
    not empty."""
    _, l, H, P = x.shape
    G, N = B.shape[2], B.shape[3]
    blocks, size, per_group = P // LANES, N * LANES, H // G
    keep, n_starts = starts.size > 0, (l + T - 1) // T
    saved, width = states.shape[1], states.shape[3]
    x, dt, d, B, C = x.reshape(-1), dt.reshape(-1), d.reshape(-1), B.reshape(-1), C.reshape(-1)
    flat, flat_h, starts = states.reshape(-1), h.reshape(-1), starts.reshape(-1)
    zero = splat(np.float32(0))
    for head in range(lo // blocks, (hi + blocks - 1) // blocks):
        first, last = max(lo - head * blocks, 0), min(hi - head * blocks, blocks)
        i, group, column = head // H, head % H // per_group, 0
        for begin in range(0, l, TILE):
            stop = min(l, begin + TILE)
            for block in range(first, last):
                S, s, skip = (head * blocks + block) * size, column, broadcast(D, head % H)
                if keep and begin % T == 0:
                    start = (((i * n_starts + begin // T) * H + head % H) * blocks + block) * size
                    for n in range(0, size, LANES):
                        store(starts, start + n, load(flat_h, S + n))
                t = begin
                while t < stop:
                    wanted = s < len(positions) and positions[s] == t
                    row, at = (i * l + t) * H + head % H, ((i * l + t) * G + group) * N
                    rows = row * P + block * LANES
                    d_0, x_0, out = broadcast(d, row), load(x, rows), zero
                    u_0 = mul(broadcast(dt, row), x_0)
                    if t + 1 < stop and not wanted:
                        d_1, x_1, out_1 = broadcast(d, row + H), load(x, rows + H * P), zero
                        u_1 = mul(broadcast(dt, row + H), x_1)
                        onward = at + G * N
                        for n in range(N):
                            h_n = fma(broadcast(B, at + n), u_0, mul(d_0, load(flat_h, S + n * LANES)))
                            out = fma(broadcast(C, at + n), h_n, out)
                            h_n = fma(broadcast(B, onward + n), u_1, mul(d_1, h_n))
                            out_1 = fma(broadcast(C, onward + n), h_n, out_1)
                            store(flat_h, S + n * LANES, h_n)
                        store(y, rows, add(out, mul(skip, x_0)))
                        t += 1
                        rows += H * P
                        x_0, out = x_1, out_1
                        wanted = s < len(positions) and positions[s] == t
                    else:
                        for n in range(N):
                            h_n = fma(broadcast(B, at + n), u_0, mul(d_0, load(flat_h, S + n * LANES)))
                            out = fma(broadcast(C, at + n), h_n, out)
                            store(flat_h, S + n * LANES, h_n)
                    store(y, rows, add(out, mul(skip, x_0)))
                    if wanted:
                        target = (((i * saved + s) * H + head % H) * width + block * LANES) * N
                        unpack(flat_h, S, flat, target, N, min(LANES, width - block * LANES))
                        s += 1
                    t += 1
            while column < len(positions) and positions[column] < stop:
                column += 1


@kernel
@no_type_check
def step(u, d, B, C, h0, h, y, from_zero, lo, hi):
    """One position, states as they are kept between calls: h = d h0 + u B^T and y = h C for the heads lo..hi.

    u and y are b 1 H P, d is b 1 H, B and C are b 1 G N, h0 and h are b H P N; `from_zero`: h0 counts as zeros.
    """
    H, P = u.shape[2:]
    G, N = B.shape[2:]
    per_group, zero = H // G, splat(np.float32(0))
    u, d, B, C, y = u.reshape(-1), d.reshape(-1), B.reshape(-1), C.reshape(-1), y.reshape(-1)
    h0, h = h0.reshape(-1), h.reshape(-1)
    for head in range(lo, hi):
        at, decay = (head // H * G + head % H // per_group) * N, broadcast(d, head)
        for p in range(head * P, (head + 1) * P):
            u_p, out = broadcast(u, p), zero
            for n in range(0, N, LANES):
                h_n = mul(u_p, load(B, at + n))
                if not from_zero:
                    h_n = fma(decay, load(h0, p * N + n), h_n)
                store(h, p * N + n, h_n)
                out = fma(load(C, at + n), h_n, out)
            y[p] = total(out)


@kernel
@no_type_check
def backward(u, d, B, C, starts, dy, g, dstates, positions, du, dd, dB, dC, lo, hi):
    """All gradients; dd starts at 0, dB and dC are this call's share. g is b H P N, in: to h_last, out: to h0."""
    _, l, H, P = u.shape
    G, N = B.shape[2], B.shape[3]
    size, per_group, n_starts = N * LANES, H // G, (l + T - 1) // T
    saved, width = dstates.shape[1], dstates.shape[3]
    u, d, B, C, dy = u.reshape(-1), d.reshape(-1), B.reshape(-1), C.reshape(-1), dy.reshape(-1)
    flat, starts, g = dstates.reshape(-1), starts.reshape(-1), g.reshape(-1)
    du, dd, dB, dC = du.reshape(-1), dd.reshape(-1), dB.reshape(-1), dC.reshape(-1)
    rows_size = ROWS * N
    zero, first = splat(np.float32(0)), np.empty(size, np.float32)
    scratch = np.empty((T + 1) * rows_size, np.float32)
    for head in range(lo, hi):
        i, group, column = head // H, head % H // per_group, len(positions) - 1
        for tile in range(n_starts - 1, -1, -1):
            begin, stop = tile * T, min(l, tile * T + T)
            for p in range(0, P, ROWS):
                if p % LANES == 0:
                    start = (((i * n_starts + tile) * H + head % H) * (P // LANES) + p // LANES) * size
                    unpack(starts, start, first, 0, N, LANES)
                for n in range(0, rows_size, LANES):
                    store(scratch, n, load(first, p % LANES * N + n))
                for t in range(begin, stop):
                    row, at, S = (i * l + t) * H + head % H, ((i * l + t) * G + group) * N, (t - begin) * rows_size
                    rows, d_t = row * P + p, broadcast(d, row)
                    for n in range(0, N, LANES):
                        B_n, dC_n, here = load(B, at + n), load(dC, at + n), S + n
                        for e in range(ROWS):
                            h_n = mul(d_t, load(scratch, here + e * N))
                            h_n = fma(B_n, broadcast(u, rows + e), h_n)
                            store(scratch, here + rows_size + e * N, h_n)
                            dC_n = fma(h_n, broadcast(dy, rows + e), dC_n)
                        store(dC, at + n, dC_n)
                s, at_g = column, (head * P + p) * N
                for t in range(stop - 1, begin - 1, -1):
                    row, at, S = (i * l + t) * H + head % H, ((i * l + t) * G + group) * N, (t - begin) * rows_size
                    rows, d_t, sum_d = row * P + p, broadcast(d, row), zero
                    if s >= 0 and positions[s] == t:
                        source = (((i * saved + s) * H + head % H) * width + p) * N
                        for n in range(max(0, min(ROWS, width - p)) * N):
                            g[at_g + n] += flat[source + n]
                        s -= 1
                    sum_0, sum_1, sum_2, sum_3 = zero, zero, zero, zero
                    for n in range(0, N, LANES):
                        B_n, C_n, here, k = load(B, at + n), load(C, at + n), S + n, at_g + n
                        g_0 = fma(broadcast(dy, rows), C_n, load(g, k))
                        g_1 = fma(broadcast(dy, rows + 1), C_n, load(g, k + N))
                        sum_0, sum_1 = fma(g_0, B_n, sum_0), fma(g_1, B_n, sum_1)
                        dB_n = fma(g_1, broadcast(u, rows + 1), fma(g_0, broadcast(u, rows), load(dB, at + n)))
                        sum_d = fma(g_1, load(scratch, here + N), fma(g_0, load(scratch, here), sum_d))
                        store(g, k, mul(g_0, d_t))
                        store(g, k + N, mul(g_1, d_t))
                        g_0 = fma(broadcast(dy, rows + 2), C_n, load(g, k + 2 * N))
                        g_1 = fma(broadcast(dy, rows + 3), C_n, load(g, k + 3 * N))
                        sum_2, sum_3 = fma(g_0, B_n, sum_2), fma(g_1, B_n, sum_3)
                        dB_n = fma(g_1, broadcast(u, rows + 3), fma(g_0, broadcast(u, rows + 2), dB_n))
                        sum_d = fma(g_1, load(scratch, here + 3 * N), fma(g_0, load(scratch, here + 2 * N), sum_d))
                        store(g, k + 2 * N, mul(g_0, d_t))
                        store(g, k + 3 * N, mul(g_1, d_t))
                        store(dB, at + n, dB_n)
                    du[rows], du[rows + 1], du[rows + 2], du[rows + 3] = (
                        total(sum_0), total(sum_1), total(sum_2), total(sum_3),
                    )  # fmt: skip
                    dd[row] += total(sum_d)
            while column >= 0 and positions[column] >= begin:
                column -= 1


@kernel
@no_type_check
def to_x(x, dt, D, dy, du, ddt, dD, lo, hi):
    """From the gradient to u = dt x, in place, the one to x; also dt's by way of u, and D's in each batch element.

    D's sums terms of both signs over all positions: in float32 for few of them only, and these in float64.
    """
    _, l, H, P = x.shape
    x, dt, dy, du = x.reshape(-1), dt.reshape(-1), dy.reshape(-1), du.reshape(-1)
    ddt, dD, zero = ddt.reshape(-1), dD.reshape(-1), splat(np.float32(0))
    for head in range(lo, hi):
        skip, sum_D = broadcast(D, head % H), np.float64(0)
        for begin in range(0, l, FEW):
            to_D = zero
            for t in range(begin, min(begin + FEW, l)):
                row = (head // H * l + t) * H + head % H
                dt_t, to_dt = broadcast(dt, row), zero
                for p in range(row * P, (row + 1) * P, LANES):
                    x_p, dy_p, du_p = load(x, p), load(dy, p), load(du, p)
                    to_dt, to_D = fma(du_p, x_p, to_dt), fma(dy_p, x_p, to_D)
                    store(du, p, fma(dt_t, du_p, mul(skip, dy_p)))
                ddt[row] = total(to_dt)
            sum_D += np.float64(total(to_D))
        dD[head] = sum_D
