"""softplus, selective scan, skip and gate in one pass through numba: the forward where nobody looks in between.

Every rounding is that of the single steps (`numba_functions`, `_numba_kernels`), so that a hook put somewhere in
between changes no bit. What is saved is memory traffic: five arrays of shape b l E that are not written and read.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from hooked_mamba.ops.numba_compile import kernel
from hooked_mamba.ops.numba_functions import silu16, softplus16
from hooked_mamba.ops.numba_lanes import LANES, add, exp2, fma, load, mul, prefetch, splat, store
from hooked_mamba.ops.selective_scan._numba_kernels import LOG2E, T


@kernel
@no_type_check
def gated(x, dt_pre, A, B, C, D, z, z_row, h, y, lo, hi):
    """y and, in place, the state h; layouts as in `_numba_kernels.forward`, rows of z lie z_row apart."""
    b, l, E = x.shape
    V, N = A.shape[0], A.shape[1]
    row, scratch = N * LANES, np.empty(T * LANES, np.float32)
    for i in range(b):
        first, last = max(lo - i * V, 0), min(hi - i * V, V)
        for start in range(0, l, T):
            for v in range(first, last):
                stop, column = min(l, start + T), v * LANES
                # Three loops: in one, the constants of softplus and SiLU would push those of the scan out of registers.
                for t in range(start, stop):
                    at = (i * l + t) * E + column
                    store(scratch, (t - start) * LANES, softplus16(load(dt_pre, at)))
                    # The next channels' numbers: rows are too far apart for the processor to guess.
                    prefetch(dt_pre, at + LANES)
                    prefetch(x, at + LANES)
                    prefetch(z, (i * l + t) * z_row + column + LANES)
                state, skip = (i * V + v) * row, load(D, column)
                for t in range(start, stop):
                    at = (i * l + t) * E + column
                    x_t, dt_t = load(x, at), load(scratch, (t - start) * LANES)
                    u, rate, out = mul(dt_t, x_t), mul(dt_t, splat(LOG2E)), splat(np.float32(0))
                    for n in range(N):
                        A_bar = exp2(mul(rate, load(A, v * row + n * LANES)))
                        h_n = fma(A_bar, load(h, state + n * LANES), mul(u, splat(B[i, t, n])))
                        store(h, state + n * LANES, h_n)
                        out = fma(splat(C[i, t, n]), h_n, out)
                    store(y, at, add(out, mul(skip, x_t)))
                for t in range(start, stop):
                    at = (i * l + t) * E + column
                    store(y, at, mul(load(y, at), silu16(load(z, (i * l + t) * z_row + column))))
