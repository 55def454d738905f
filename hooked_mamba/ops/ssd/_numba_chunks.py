"""All gradients of Mamba-2's numba backend, a chunk of positions at a time, as products of small matrices.

The equations are those of `_numba_kernels`. Inside a chunk, with L_ts = d_t d_{t-1} ... d_{s+1} for t >= s, H the state
before it and G what later chunks send to the state behind it,
    du_s = sum_t L_ts (C_t B_s) dy_t  +  L_qs G B_s
    dB_s = sum_t L_ts (dy_t u_s) C_t  +  L_qs G^T u_s
    dC_t = sum_s L_ts (dy_t u_s) B_s  +  L_t0 H^T dy_t
    G   <- L_q0 G  +  sum_t L_t0 dy_t C_t^T
and the gradient to log d_t is the sum of what passes it: from every write before to every read from t on, the state
before the chunk and the adjoint behind it among them. All are sums of such terms and none is a difference, so that
nothing cancels. The first term of dB and dC is summed over the heads of a group before it is multiplied.

A matrix lies in panels of 16 columns, one after the other, so that a product reads from front to back; four rows of a
panel are summed at a time, which fill the registers of AVX2. A packed state is the panels of its transpose. One unit of
work is a head. All arrays are contiguous float32; P and N are multiples of 16.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from hooked_mamba.ops.numba_compile import kernel, part
from hooked_mamba.ops.numba_lanes import LANES, add, broadcast, fma, load, mul, splat, store, total, transpose
from hooked_mamba.ops.ssd._numba_kernels import T


@part
@no_type_check
def four(A, a, across, along, X, x, count, s_0, s_1, s_2, s_3):
    """s_i + sum over k < count of A[a + i across + k along] X[x + 16 k :][:16], for four i."""
    for _ in range(count):
        x_k = load(X, x)
        s_0 = fma(broadcast(A, a), x_k, s_0)
        s_1 = fma(broadcast(A, a + across), x_k, s_1)
        s_2 = fma(broadcast(A, a + 2 * across), x_k, s_2)
        s_3 = fma(broadcast(A, a + 3 * across), x_k, s_3)
        a += along
        x += LANES
    return s_0, s_1, s_2, s_3


@part
@no_type_check
def get(source, at, step):
    """Four, `step` apart."""
    return load(source, at), load(source, at + step), load(source, at + 2 * step), load(source, at + 3 * step)


@part
@no_type_check
def scaled(factor, four_s):
    """Four times a factor."""
    s_0, s_1, s_2, s_3 = four_s
    return mul(factor, s_0), mul(factor, s_1), mul(factor, s_2), mul(factor, s_3)


@part
@no_type_check
def put(target, at, step, count, s_0, s_1, s_2, s_3):
    """The first `count` of four, `step` apart."""
    store(target, at, s_0)
    if count > 1:
        store(target, at + step, s_1)
    if count > 2:
        store(target, at + 2 * step, s_2)
    if count > 3:
        store(target, at + 3 * step, s_3)


@part
@no_type_check
def take(source, start, stride, q, width, panels):
    """q rows, `stride` apart, as panels of T rows; zeros behind them."""
    for t in range(T):
        for n in range(0, width, LANES):
            store(panels, n * T + t * LANES, load(source, start + t * stride + n) if t < q else splat(np.float32(0)))


@part
@no_type_check
def turn(panels, rows, columns, target):
    """The panels of a matrix (rows x columns) into those of its transpose."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            transpose(panels, c * rows + r * LANES, LANES, target, r * columns + c * LANES, LANES)


@part
@no_type_check
def over_rows(A, a, X, x, P, N):
    """Sums over p of A[n, p] X[p, :16], for four n; A is a state, packed, and X a panel."""
    zero = splat(np.float32(0))
    s_0, s_1, s_2, s_3 = zero, zero, zero, zero
    for p in range(0, P, LANES):
        s_0, s_1, s_2, s_3 = four(A, a + p * N, LANES, 1, X, x + p * LANES, LANES, s_0, s_1, s_2, s_3)
    return s_0, s_1, s_2, s_3


@part
@no_type_check
def gained(decay, four_v, X, out, k, so_far):
    """Add four rows, decayed, to those of `out` at k; `so_far` gains their products with the rows of X."""
    v_0, v_1, v_2, v_3 = scaled(decay, four_v)
    store(out, k, add(v_0, load(out, k)))
    store(out, k + LANES, add(v_1, load(out, k + LANES)))
    store(out, k + 2 * LANES, add(v_2, load(out, k + 2 * LANES)))
    store(out, k + 3 * LANES, add(v_3, load(out, k + 3 * LANES)))
    so_far = fma(v_1, load(X, k + LANES), fma(v_0, load(X, k), so_far))
    return fma(v_3, load(X, k + 3 * LANES), fma(v_2, load(X, k + 2 * LANES), so_far))


@part
@no_type_check
def cell(r, columns):
    """Where row r begins in panels of a transpose with so many columns."""
    return r // LANES * LANES * columns + r % LANES


@part
@no_type_check
def panels(columns):
    """Zeros, T rows of them."""
    return np.zeros(T * columns, np.float32)


@part
@no_type_check
def decays(d, at, stride, q, L, since):
    """L, zeros where a position cannot reach, and the decay from the start of the chunk to each position."""
    L[:] = 0
    through = np.float32(1)
    for t in range(q):
        d_t, k = d[at + t * stride], t * T
        through *= d_t
        since[t] = through
        for s in range(0, t, LANES):
            store(L, k + s, mul(splat(d_t), load(L, k - T + s)))
        L[k + t] = 1


@kernel
@no_type_check
def backward(u, d, B, C, starts, dy, g, du, dl, dB, dC, lo, hi):
    """All gradients; dl is to log d, dB and dC are this call's share. g is packed, in: to h_last, out: to h0."""
    _, l, H, P = u.shape
    G, N = B.shape[2], B.shape[3]
    per_group, n_starts, size = H // G, (l + T - 1) // T, P * N
    u, d, B, C, dy = u.reshape(-1), d.reshape(-1), B.reshape(-1), C.reshape(-1), dy.reshape(-1)
    starts, g, du, dl = starts.reshape(-1), g.reshape(-1), du.reshape(-1), dl.reshape(-1)
    dB, dC, zero = dB.reshape(-1), dC.reshape(-1), splat(np.float32(0))
    zeros = (zero, zero, zero, zero)
    # Of one chunk: panels (_q), those of the transpose (_t), and pairs of its positions
    B_q, B_t, dB_q, dB_t = panels(N), panels(N), panels(N), panels(N)
    C_q, C_t, dC_q, dC_t = panels(N), panels(N), panels(N), panels(N)
    u_q, u_t, dy_q, dy_t = panels(P), panels(P), panels(P), panels(P)
    CB, dCB, L, M, W, before = panels(T), panels(T), panels(T), panels(T), panels(T), panels(T)
    since, read, written = panels(1), panels(1), panels(1)
    for t in range(T):
        before[t * T : t * T + t] = 1
    for unit in range(lo // per_group, (hi + per_group - 1) // per_group):
        i, group = unit // G, unit % G
        for tile in range(n_starts - 1, -1, -1):
            begin = tile * T
            q = min(l - begin, T)
            last, at = (q - 1) * T, ((i * l + begin) * G + group) * N
            take(B, at, G * N, q, N, B_q)
            take(C, at, G * N, q, N, C_q)
            turn(B_q, T, N, B_t)
            turn(C_q, T, N, C_t)
            for s in range(0, q, LANES):
                for t in range(s, q, 4):
                    put(CB, t * T + s, T, 4, *four(C_t, cell(t, N), 1, LANES, B_t, s * N, N, *zeros))
            dCB[:] = 0
            dB_t[:] = 0
            dC_t[:] = 0
            for head in range(max(lo, unit * per_group), min(hi, (unit + 1) * per_group)):
                row, own = (i * l + begin) * H + head % H, head * size
                start = ((i * n_starts + tile) * H + head % H) * size
                take(u, row * P, H * P, q, P, u_q)
                take(dy, row * P, H * P, q, P, dy_q)
                turn(u_q, T, P, u_t)
                turn(dy_q, T, P, dy_t)
                decays(d, row, H, q, L, since)
                for s in range(0, q, LANES):
                    for t in range(s, q, 4):
                        put(W, t * T + s, T, 4, *four(dy_t, cell(t, P), 1, LANES, u_t, s * P, P, *zeros))
                # Pairs inside the chunk
                sums_0, sums_1 = zero, zero
                for t in range(q - 1, -1, -1):
                    k = t * T
                    L_k, CB_k = load(L, k), load(CB, k)
                    W_k = mul(L_k, load(W, k))
                    store(M, k, mul(L_k, CB_k))
                    store(dCB, k, add(W_k, load(dCB, k)))
                    sums_0 = fma(W_k, CB_k, sums_0)
                    k += LANES
                    if t >= LANES:
                        L_k, CB_k = load(L, k), load(CB, k)
                        W_k = mul(L_k, load(W, k))
                        store(M, k, mul(L_k, CB_k))
                        store(dCB, k, add(W_k, load(dCB, k)))
                        sums_1 = fma(W_k, CB_k, sums_1)
                    else:
                        store(M, k, zero)
                    dl[row + t * H] = total(fma(sums_0, load(before, t * T), mul(sums_1, load(before, k))))
                # du
                for p in range(0, P, LANES):
                    for s in range(0, q, 4):
                        v_0, v_1, v_2, v_3 = four(B_t, cell(s, N), 1, LANES, g, own + p * N, N, *zeros)
                        v_0, v_1 = mul(v_0, broadcast(L, last + s)), mul(v_1, broadcast(L, last + s + 1))
                        v_2, v_3 = mul(v_2, broadcast(L, last + s + 2)), mul(v_3, broadcast(L, last + s + 3))
                        inside = four(M, s * T + s, 1, T, dy_q, p * T + s * LANES, q - s, v_0, v_1, v_2, v_3)
                        put(du, (row + s * H) * P + p, H * P, q - s, *inside)
                # Between the chunk and the states at its ends
                for t in range(0, q, LANES):
                    to_read, to_written, from_start, to_end = zero, zero, load(since, t), load(L, last + t)
                    for n in range(0, N, 4):
                        k = t * N + n * LANES
                        four_v = over_rows(starts, start + n * LANES, dy_t, t * P, P, N)
                        to_read = gained(from_start, four_v, C_t, dC_t, k, to_read)
                        four_v = over_rows(g, own + n * LANES, u_t, t * P, P, N)
                        to_written = gained(to_end, four_v, B_t, dB_t, k, to_written)
                    store(read, t, to_read)
                    store(written, t, to_written)
                # G
                for t in range(q):
                    for p in range(0, P, LANES):
                        k = p * T + t * LANES
                        store(dy_q, k, mul(broadcast(since, t), load(dy_q, k)))
                whole, through = broadcast(since, q - 1), zero
                for p in range(0, P, LANES):
                    for n in range(0, N, 4):
                        k, h = own + p * N + n * LANES, start + p * N + n * LANES
                        g_0, g_1, g_2, g_3 = get(g, k, LANES)
                        through = fma(g_1, load(starts, h + LANES), fma(g_0, load(starts, h), through))
                        through = fma(g_3, load(starts, h + 3 * LANES), fma(g_2, load(starts, h + 2 * LANES), through))
                        ours = scaled(whole, (g_0, g_1, g_2, g_3))
                        put(g, k, LANES, 4, *four(C_q, cell(n, T), 1, LANES, dy_q, p * T, q, *ours))
                onto = total(mul(whole, through))
                for t in range(q):
                    dl[row + t * H] += onto
                    onto += written[t]
                onto = np.float32(0)
                for t in range(q - 1, -1, -1):
                    onto += read[t]
                    dl[row + t * H] += onto
            turn(dB_t, N, T, dB_q)
            turn(dC_t, N, T, dC_q)
            for n in range(0, N, LANES):
                for t in range(0, q, 4):
                    k, target = n * T + t * LANES, at + t * G * N + n
                    inside = four(dCB, t * T, T, 1, B_q, n * T, min(q, t + 4), *get(dC_q, k, LANES))
                    put(dC, target, G * N, q - t, *inside)
                    inside = four(dCB, t * T + t, 1, T, C_q, k, q - t, *get(dB_q, k, LANES))
                    put(dB, target, G * N, q - t, *inside)
