"""The delta rule, all gradients: a program walks its rows of the adjoint L from the end.

    L_t = dy_t r_t^T + dstates_t + L_{t+1} diag(w_{t+1}) + c_{t+1} a_{t+1}^T,      c_t = L_t b_t + drecall_t
    dr = S_t^T dy,   dk = L^T v,   dv = L k,   dw = sum_V S_{t-1} L,   da = S_{t-1}^T c,   db = L^T recall

States are made again T positions at a time, into scratch of the program's own, from those that the forward kept. Sums
over rows are written as one part per block of rows and added up afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.delta_scan._triton_forward import advance, decay_at, numbers


@triton.jit
def delta_backward(
    R, W, KEYS, VALUES, A, B, SAVE, STARTS, SCRATCH, DY, DRECALL, DLAST, DSTATES,
    DR, DW, DK, DV, DA, DB, DFIRST,
    L, H, K, V, n_starts, n_states, n_batch,
    T: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Layouts and grid as in `delta_forward`; SCRATCH: programs T BV BK; DR, DW, DK, DA, DB: parts, b L H K, float32.

    DRECALL, DLAST and DSTATES (with SAVE) may be None.
    """
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % H
    batch = (pid // blocks // H).to(tl.int64)
    e, n = tl.arange(0, BV), tl.arange(0, BK)
    p = block * BV + e
    here_n, here_p = n < K, p < V
    here = here_p[:, None] & here_n[None, :]
    at = p[:, None] * K + n[None, :]
    scratch = SCRATCH + pid.to(tl.int64) * T * BV * BK + e[:, None] * BK + n[None, :]
    adjoint = tl.zeros((BV, BK), tl.float32)
    if DLAST is not None:
        adjoint = tl.load(DLAST + (batch * H + head) * V * K + at, mask=here, other=0.0)
    for step in range(n_starts):
        begin = (n_starts - 1 - step) * T
        stop = tl.minimum(begin + T, L)
        S = tl.load(STARTS + ((batch * n_starts + begin // T) * H + head) * V * K + at, mask=here, other=0.0)
        for t in range(begin, stop):
            tl.store(scratch + (t - begin) * BV * BK, S)
            row = (batch * L + t) * H + head
            held = tl.sum(S * numbers(A, row * K + n, here_n)[None, :], 1)
            k, b = numbers(KEYS, row * K + n, here_n), numbers(B, row * K + n, here_n)
            S = advance(S, decay_at(W, row, K, n, here_n, WIDE), k, numbers(VALUES, row * V + p, here_p), b, held)
        tl.debug_barrier()  # a lane may read what another has written
        for back in range(stop - begin):
            t = stop - 1 - back
            row = (batch * L + t) * H + head
            before = tl.load(scratch + (t - begin) * BV * BK)
            r, a, b = numbers(R, row * K + n, here_n), numbers(A, row * K + n, here_n), numbers(B, row * K + n, here_n)
            k, v = numbers(KEYS, row * K + n, here_n), numbers(VALUES, row * V + p, here_p)
            w = decay_at(W, row, K, n, here_n, WIDE)
            dy = numbers(DY, row * V + p, here_p)
            held = tl.sum(before * a[None, :], 1)
            if SAVE is not None:
                save = tl.load(SAVE + t)
                if save >= 0:
                    at_save = ((batch * n_states + save) * H + head) * V * K
                    adjoint += tl.load(DSTATES + at_save + at, mask=here, other=0.0)
            adjoint += dy[:, None] * r[None, :]
            c = tl.sum(adjoint * b[None, :], 1)
            if DRECALL is not None:
                c += numbers(DRECALL, row * V + p, here_p)
            tl.store(DV + row * V + p, tl.sum(adjoint * k[None, :], 1), mask=here_p)
            part = ((block * n_batch + batch) * L + t) * H * K + head * K + n
            tl.store(DR + part, tl.sum(advance(before, w, k, v, b, held) * dy[:, None], 0), mask=here_n)
            tl.store(DK + part, tl.sum(adjoint * v[:, None], 0), mask=here_n)
            tl.store(DW + part, tl.sum(adjoint * before, 0), mask=here_n)
            tl.store(DA + part, tl.sum(before * c[:, None], 0), mask=here_n)
            tl.store(DB + part, tl.sum(adjoint * held[:, None], 0), mask=here_n)
            adjoint = adjoint * w[None, :] + c[:, None] * a[None, :]
        tl.debug_barrier()  # before the next positions' states take the place of these
    tl.store(DFIRST + (batch * H + head) * V * K + at, adjoint, mask=here)
