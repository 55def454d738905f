"""The adjoint of a held scan for many covectors: what decays is worked out once for all that share a row of the run."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from hooked_mamba.ops.numba_compile import kernel
from hooked_mamba.ops.numba_lanes import LANES, exp2, fma, load, mul, prefetch, splat, store
from hooked_mamba.ops.selective_scan._numba_kernels import LOG2E, T


@kernel
@no_type_check
def pull(dt, A, B, C, D, order, bounds, v, g, dx, lo, hi):
    """dx and, in place, the adjoint state g (in: zeros; out: to h0); layouts as in `_numba_kernels.adjoint`.

    v, g and dx have n covectors in front. Those of row r of the run are order[bounds[r]:bounds[r + 1]]. One unit of
    work is 16 channels of one row.
    """
    _, l, E = dt.shape
    V, N = A.shape[0], A.shape[1]
    row, decays = N * LANES, np.empty(T * A.shape[1] * LANES, np.float32)
    for unit in range(lo, hi):
        r, block = unit // V, unit % V
        column, skip = block * LANES, load(D, block * LANES)
        for tile in range((l + T - 1) // T - 1, -1, -1):
            begin, stop = tile * T, min(l, tile * T + T)
            for t in range(begin, stop):
                rate = mul(load(dt, (r * l + t) * E + column), splat(LOG2E))
                for n in range(N):
                    A_bar = exp2(mul(rate, load(A, block * row + n * LANES)))
                    store(decays, (t - begin) * row + n * LANES, A_bar)
            for k in range(bounds[r], bounds[r + 1]):
                i = order[k]
                state = (i * V + block) * row
                for t in range(stop - 1, begin - 1, -1):
                    at = (i * l + t) * E + column
                    prefetch(v, at + LANES)
                    v_t, gB = load(v, at), splat(np.float32(0))
                    for n in range(N):
                        g_n = fma(splat(C[r, t, n]), v_t, load(g, state + n * LANES))
                        gB = fma(g_n, splat(B[r, t, n]), gB)
                        store(g, state + n * LANES, mul(load(decays, (t - begin) * row + n * LANES), g_n))
                    store(dx, at, fma(gB, load(dt, (r * l + t) * E + column), mul(skip, v_t)))
