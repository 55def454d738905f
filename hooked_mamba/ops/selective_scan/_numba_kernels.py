"""The kernels of the numba backend: forward, backward and the adjoint alone.

One unit of work is 16 channels of one batch element; a call does the units lo..hi and holds no lock, so threads share
out the units. States lie packed, N x 16 together for every unit, hence shapes `b V N 16` with V = E / 16. E here is a
multiple of 16. The sequence is walked in tiles of T positions, and within a tile over the units: what a tile needs
stays in the first two caches, whatever the length.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from hooked_mamba.ops.numba_compile import kernel
from hooked_mamba.ops.numba_lanes import LANES, exp2, fma, load, mul, splat, store, total
from hooked_mamba.ops.numba_packed import add_packed, unpack

T = 16
"""Positions per tile; the backward keeps one state per tile."""

LOG2E = np.float32(1.4426950408889634)


@kernel
@no_type_check
def forward(x, dt, A, B, C, D, h, y, starts, states, positions, lo, hi):
    """y and, in place, the state h; states at the tiles' starts if `starts` is not empty."""
    b, l, E = x.shape
    V, N = A.shape[0], A.shape[1]
    row = N * LANES
    tiles = (l + T - 1) // T
    keep = starts.size > 0
    saved, width = states.shape[1], states.shape[2]
    flat, flat_h = states.reshape(-1), h.reshape(-1)
    for i in range(b):
        first, last = max(lo - i * V, 0), min(hi - i * V, V)
        if first >= last:
            continue
        column = 0
        for tile in range(tiles):
            stop = min(l, tile * T + T)
            for v in range(first, last):
                state, skip = (i * V + v) * row, load(D, v * LANES)
                if keep:
                    start = ((i * tiles + tile) * V + v) * row
                    for n in range(N):
                        store(starts, start + n * LANES, load(h, state + n * LANES))
                s = column
                for t in range(tile * T, stop):
                    at = (i * l + t) * E + v * LANES
                    x_t, dt_t = load(x, at), load(dt, at)
                    u, rate, out = mul(dt_t, x_t), mul(dt_t, splat(LOG2E)), mul(skip, x_t)
                    for n in range(N):
                        A_bar = exp2(mul(rate, load(A, v * row + n * LANES)))
                        h_n = fma(A_bar, load(h, state + n * LANES), mul(u, splat(B[i, t, n])))
                        store(h, state + n * LANES, h_n)
                        out = fma(splat(C[i, t, n]), h_n, out)
                    store(y, at, out)
                    if s < len(positions) and positions[s] == t:
                        lanes = min(LANES, width - v * LANES)
                        unpack(flat_h, state, flat, ((i * saved + s) * width + v * LANES) * N, N, lanes)
                        s += 1
            while column < len(positions) and positions[column] < stop:
                column += 1


@kernel
@no_type_check
def adjoint(dt, A, B, C, D, dy, g, dstates, positions, dx, lo, hi):
    """dx and, in place, the adjoint state g (in: gradient to h_last; out: to h0). No state is needed."""
    b, l, E = dt.shape
    V, N = A.shape[0], A.shape[1]
    row = N * LANES
    saved, width = dstates.shape[1], dstates.shape[2]
    flat, flat_g, scratch = dstates.reshape(-1), g.reshape(-1), np.empty(row, np.float32)
    for i in range(b):
        first, last = max(lo - i * V, 0), min(hi - i * V, V)
        if first >= last:
            continue
        column = len(positions) - 1
        for tile in range((l + T - 1) // T - 1, -1, -1):
            stop = min(l, tile * T + T)
            for v in range(first, last):
                state, skip = (i * V + v) * row, load(D, v * LANES)
                s = column
                for t in range(stop - 1, tile * T - 1, -1):
                    if s >= 0 and positions[s] == t:
                        lanes, source = min(LANES, width - v * LANES), (i * saved + s) * width + v * LANES
                        add_packed(flat, source * N, N, lanes, flat_g, state, scratch)
                        s -= 1
                    at = (i * l + t) * E + v * LANES
                    dy_t, dt_t = load(dy, at), load(dt, at)
                    rate, gB = mul(dt_t, splat(LOG2E)), splat(np.float32(0))
                    for n in range(N):
                        A_bar = exp2(mul(rate, load(A, v * row + n * LANES)))
                        g_n = fma(splat(C[i, t, n]), dy_t, load(g, state + n * LANES))
                        gB = fma(g_n, splat(B[i, t, n]), gB)
                        store(g, state + n * LANES, mul(A_bar, g_n))
                    store(dx, at, fma(gB, dt_t, mul(skip, dy_t)))
            while column >= 0 and positions[column] >= tile * T:
                column -= 1


@kernel
@no_type_check
def backward(x, dt, A, B, C, D, starts, dy, g, dstates, positions, dx, ddt, dA, dB, dC, dD, lo, hi):
    """All gradients. g as in `adjoint`; dA b V N 16 and dD b E start at 0; dB, dC are this call's share."""
    b, l, E = x.shape
    V, N = A.shape[0], A.shape[1]
    row = N * LANES
    tiles = (l + T - 1) // T
    saved, width = dstates.shape[1], dstates.shape[2]
    flat, flat_g, scratch = dstates.reshape(-1), g.reshape(-1), np.empty(row, np.float32)
    zero = splat(np.float32(0))
    hs = np.empty((T + 1) * row, np.float32)
    A_bars = np.empty(T * row, np.float32)
    sum_B, sum_C = np.empty(T * row, np.float32), np.empty(T * row, np.float32)
    for i in range(b):
        first, last = max(lo - i * V, 0), min(hi - i * V, V)
        if first >= last:
            continue
        column = len(positions) - 1
        for tile in range(tiles - 1, -1, -1):
            t0 = tile * T
            length = min(l - t0, T)
            sum_B[:] = 0
            sum_C[:] = 0
            for v in range(first, last):
                state, skip = (i * V + v) * row, load(D, v * LANES)
                start = ((i * tiles + tile) * V + v) * row
                for n in range(N):
                    store(hs, n * LANES, load(starts, start + n * LANES))
                for t in range(length):
                    at = (i * l + t0 + t) * E + v * LANES
                    dt_t = load(dt, at)
                    u, rate = mul(dt_t, load(x, at)), mul(dt_t, splat(LOG2E))
                    for n in range(N):
                        k = t * row + n * LANES
                        A_bar = exp2(mul(rate, load(A, v * row + n * LANES)))
                        store(A_bars, k, A_bar)
                        store(hs, k + row, fma(A_bar, load(hs, k), mul(u, splat(B[i, t0 + t, n]))))
                s = column
                dD_v = load(dD, i * E + v * LANES)
                for t in range(length - 1, -1, -1):
                    if s >= 0 and positions[s] == t0 + t:
                        lanes, source = min(LANES, width - v * LANES), (i * saved + s) * width + v * LANES
                        add_packed(flat, source * N, N, lanes, flat_g, state, scratch)
                        s -= 1
                    at = (i * l + t0 + t) * E + v * LANES
                    x_t, dt_t, dy_t = load(x, at), load(dt, at), load(dy, at)
                    u, gB, qA = mul(dt_t, x_t), zero, zero
                    for n in range(N):
                        k = t * row + n * LANES
                        g_n = fma(splat(C[i, t0 + t, n]), dy_t, load(g, state + n * LANES))
                        carried = mul(g_n, load(A_bars, k))
                        q = mul(carried, load(hs, k))
                        gB = fma(g_n, splat(B[i, t0 + t, n]), gB)
                        qA = fma(q, load(A, v * row + n * LANES), qA)
                        store(sum_B, k, fma(g_n, u, load(sum_B, k)))
                        store(sum_C, k, fma(dy_t, load(hs, k + row), load(sum_C, k)))
                        store(dA, state + n * LANES, fma(q, dt_t, load(dA, state + n * LANES)))
                        store(g, state + n * LANES, carried)
                    store(dx, at, fma(gB, dt_t, mul(skip, dy_t)))
                    store(ddt, at, fma(gB, x_t, qA))
                    dD_v = fma(dy_t, x_t, dD_v)
                store(dD, i * E + v * LANES, dD_v)
            while column >= 0 and positions[column] >= t0:
                column -= 1
            for t in range(length):
                for n in range(N):
                    dB[i, t0 + t, n] = total(load(sum_B, t * row + n * LANES))
                    dC[i, t0 + t, n] = total(load(sum_C, t * row + n * LANES))
