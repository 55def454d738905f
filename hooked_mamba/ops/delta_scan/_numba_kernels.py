"""The kernels of the numba backend: forward, and all gradients.

Rows of the state never meet. Forward, a lane is a row: one unit of work is 16 rows of one head of one batch element,
whose 16 K numbers stay in the first cache; a position goes over them once and makes, at each key,
    S_t = w S_{t-1} + b recall_t + k v_t,      y_t += r S_t,      recall_{t+1} += a_{t+1} S_t
(5 multiply-adds; 4 where b is a multiple of k). Backward, a lane is a key, so that sums over rows need no lanes to
meet: one unit is a head, with L the adjoint of its state. States are kept every T positions, and made again from there.
    L_t = dy_t r_t^T + dstates_t + L_{t+1} diag(w_{t+1}) + c_{t+1} a_{t+1}^T,      c_t = L_t b_t + drecall_t
    dr = S_t^T dy,   dk = L^T v,   dv = L k,   dw = sum_V S_{t-1} L,   da = S_{t-1}^T c,   db = L^T recall
All arrays are contiguous float32; K and V are multiples of 16. w is b l H K or b l H 1; so is b in the forward, for
that multiple of k.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from hooked_mamba.ops.numba_compile import kernel
from hooked_mamba.ops.numba_lanes import LANES, add, broadcast, fma, load, mul, splat, store, total
from hooked_mamba.ops.numba_packed import unpack

T = 32
"""Positions between the states that the backward starts from."""

TILE = 8
"""Positions that the forward walks before it turns to the next rows: their numbers stay in the first cache."""


@kernel
@no_type_check
def forward(r, w, k, v, a, b, h, y, recall, starts, states, positions, lo, hi):
    """y, recall and, in place, the state h (b H V/16 K 16); states at every T positions if `starts` is not empty."""
    _, l, H, K = k.shape
    V = v.shape[3]
    blocks, size, wide = V // LANES, K * LANES, w.shape[3]
    step, multiple = 1 if wide == K else 0, b.shape[3] < K
    keep, n_starts = starts.size > 0, (l + T - 1) // T
    saved, width = states.shape[1], states.shape[3]
    r, w, k, v, a, b = r.reshape(-1), w.reshape(-1), k.reshape(-1), v.reshape(-1), a.reshape(-1), b.reshape(-1)
    flat, flat_h = states.reshape(-1), h.reshape(-1)
    zero = splat(np.float32(0))
    for head in range(lo // blocks, (hi + blocks - 1) // blocks):
        first, last = max(lo - head * blocks, 0), min(hi - head * blocks, blocks)
        i, column = head // H, 0
        for begin in range(0, l, TILE):
            stop = min(l, begin + TILE)
            block = first
            while block < last:
                S, s = (head * blocks + block) * size, column
                # Two blocks of rows at once share each number of the keys, and have twice the sums under way.
                two = block + 1 < last
                both = size if two else 0
                if keep and begin % T == 0:
                    start = (((i * n_starts + begin // T) * H + head % H) * blocks + block) * size
                    for n in range(0, size + both, LANES):
                        store(starts, start + n, load(flat_h, S + n))
                at = ((i * l + begin) * H + head % H) * K
                held, held_2 = zero, zero
                for n in range(K):
                    a_n = broadcast(a, at + n)
                    held = fma(a_n, load(flat_h, S + n * LANES), held)
                    if two:
                        held_2 = fma(a_n, load(flat_h, S + size + n * LANES), held_2)
                for t in range(begin, stop):
                    row = (i * l + t) * H + head % H
                    at, onward, decay = row * K, (row + (H if t + 1 < l else 0)) * K, row * wide
                    at_v = row * V + block * LANES
                    v_t, out, next_held = load(v, at_v), zero, zero
                    v_2, out_2, next_2 = v_t, zero, zero
                    if two:
                        v_2 = load(v, at_v + LANES)
                    if multiple:
                        v_t, v_2 = fma(broadcast(b, row), held, v_t), fma(broadcast(b, row), held_2, v_2)
                    if two and multiple:
                        for n in range(K):
                            w_n, k_n = broadcast(w, decay), broadcast(k, at + n)
                            r_n, a_n = broadcast(r, at + n), broadcast(a, onward + n)
                            place = S + n * LANES
                            S_n = fma(k_n, v_t, mul(w_n, load(flat_h, place)))
                            S_2 = fma(k_n, v_2, mul(w_n, load(flat_h, place + size)))
                            store(flat_h, place, S_n)
                            store(flat_h, place + size, S_2)
                            out, out_2 = fma(r_n, S_n, out), fma(r_n, S_2, out_2)
                            next_held, next_2 = fma(a_n, S_n, next_held), fma(a_n, S_2, next_2)
                            decay += step
                    elif two:
                        for n in range(K):
                            w_n, k_n, b_n = broadcast(w, decay), broadcast(k, at + n), broadcast(b, at + n)
                            r_n, a_n = broadcast(r, at + n), broadcast(a, onward + n)
                            place = S + n * LANES
                            S_n = fma(k_n, v_t, fma(b_n, held, mul(w_n, load(flat_h, place))))
                            S_2 = fma(k_n, v_2, fma(b_n, held_2, mul(w_n, load(flat_h, place + size))))
                            store(flat_h, place, S_n)
                            store(flat_h, place + size, S_2)
                            out, out_2 = fma(r_n, S_n, out), fma(r_n, S_2, out_2)
                            next_held, next_2 = fma(a_n, S_n, next_held), fma(a_n, S_2, next_2)
                            decay += step
                    else:
                        for n in range(K):
                            S_n = mul(broadcast(w, decay), load(flat_h, S + n * LANES))
                            if not multiple:
                                S_n = fma(broadcast(b, at + n), held, S_n)
                            S_n = fma(broadcast(k, at + n), v_t, S_n)
                            store(flat_h, S + n * LANES, S_n)
                            out = fma(broadcast(r, at + n), S_n, out)
                            next_held = fma(broadcast(a, onward + n), S_n, next_held)
                            decay += step
                    store(y, at_v, out)
                    store(recall, at_v, held)
                    if two:
                        store(y, at_v + LANES, out_2)
                        store(recall, at_v + LANES, held_2)
                    held, held_2 = next_held, next_2
                    if s < len(positions) and positions[s] == t:
                        for one in range(block, block + 1 + two):
                            target = (((i * saved + s) * H + head % H) * width + one * LANES) * K
                            from_h = (head * blocks + one) * size
                            unpack(flat_h, from_h, flat, target, K, min(LANES, width - one * LANES))
                        s += 1
                block += 1 + two
            while column < len(positions) and positions[column] < stop:
                column += 1


@kernel
@no_type_check
def backward(r, w, k, v, a, b, recall, starts, dy, drecall, g, dstates, positions, dr, dw, dk, dv, da, db, lo, hi):
    """All gradients; dr, dw, dk, da and db start at 0. g is b H V K, in: the gradient to h_last, out: to h0."""
    _, l, H, K = k.shape
    V, wide = v.shape[3], w.shape[3]
    blocks, size = V // LANES, K * LANES
    n_starts = (l + T - 1) // T
    saved, width = dstates.shape[1], dstates.shape[3]
    r, w, k, v, a, b = r.reshape(-1), w.reshape(-1), k.reshape(-1), v.reshape(-1), a.reshape(-1), b.reshape(-1)
    recall, dy, drecall, flat = recall.reshape(-1), dy.reshape(-1), drecall.reshape(-1), dstates.reshape(-1)
    starts, L, dv = starts.reshape(-1), g.reshape(-1), dv.reshape(-1)
    zero, scratch, c = splat(np.float32(0)), np.empty((T + 1) * size, np.float32), np.empty(LANES, np.float32)
    for head in range(lo, hi):
        i, column = head // H, len(positions) - 1
        for tile in range(n_starts - 1, -1, -1):
            begin, stop = tile * T, min(l, tile * T + T)
            for block in range(blocks):
                unpack(starts, (((i * n_starts + tile) * H + head % H) * blocks + block) * size, scratch, 0, K, LANES)
                for t in range(begin, stop):
                    row = (i * l + t) * H + head % H
                    at, rows, S = row * K, row * V + block * LANES, (t - begin) * size
                    for n in range(0, K, LANES):
                        w_n = load(w, row * K + n) if wide == K else broadcast(w, row)
                        k_n, b_n = load(k, at + n), load(b, at + n)
                        for e in range(LANES):
                            S_n = mul(w_n, load(scratch, S + e * K + n))
                            S_n = fma(k_n, broadcast(v, rows + e), fma(b_n, broadcast(recall, rows + e), S_n))
                            store(scratch, S + size + e * K + n, S_n)
                s = column
                for t in range(stop - 1, begin - 1, -1):
                    row = (i * l + t) * H + head % H
                    at, rows, S = row * K, row * V + block * LANES, (t - begin) * size
                    at_L = (head * V + block * LANES) * K
                    if s >= 0 and positions[s] == t:
                        source = (((i * saved + s) * H + head % H) * width + block * LANES) * K
                        for n in range(0, min(LANES, width - block * LANES) * K, LANES):
                            store(L, at_L + n, add(load(L, at_L + n), load(flat, source + n)))
                        s -= 1
                    for e in range(LANES):
                        dy_e, sum_b, sum_k = broadcast(dy, rows + e), zero, zero
                        for n in range(0, K, LANES):
                            L_n = fma(dy_e, load(r, at + n), load(L, at_L + e * K + n))
                            store(L, at_L + e * K + n, L_n)
                            sum_b = fma(L_n, load(b, at + n), sum_b)
                            sum_k = fma(L_n, load(k, at + n), sum_k)
                        c[e] = total(sum_b) + drecall[rows + e]
                        dv[rows + e] = total(sum_k)
                    for n in range(0, K, LANES):
                        w_n = load(w, row * K + n) if wide == K else broadcast(w, row)
                        a_n = load(a, at + n)
                        dr_n, dw_n, dk_n = load(dr, at + n), load(dw, at + n), load(dk, at + n)
                        da_n, db_n = load(da, at + n), load(db, at + n)
                        for e in range(LANES):
                            here = e * K + n
                            L_n, before, c_e = load(L, at_L + here), load(scratch, S + here), broadcast(c, e)
                            dr_n = fma(load(scratch, S + size + here), broadcast(dy, rows + e), dr_n)
                            dw_n = fma(before, L_n, dw_n)
                            dk_n = fma(L_n, broadcast(v, rows + e), dk_n)
                            da_n = fma(before, c_e, da_n)
                            db_n = fma(L_n, broadcast(recall, rows + e), db_n)
                            store(L, at_L + here, fma(c_e, a_n, mul(L_n, w_n)))
                        store(dr, at + n, dr_n)
                        store(dw, at + n, dw_n)
                        store(dk, at + n, dk_n)
                        store(da, at + n, da_n)
                        store(db, at + n, db_n)
            while column >= 0 and positions[column] >= begin:
                column -= 1
