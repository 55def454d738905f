"""The delta rule, forward: a program holds BV rows of one head's state and walks along the sequence.

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,      y_t = S_t r_t,      recall_t = S_{t-1} a_t

Rows of the state never meet, so programs need nothing of each other. Any decay is exact: nothing is divided.
"""
# ruff: noqa: SIM102  (a condition known when compiling and one known when running do not combine)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers(X, at, inside):
    """Numbers of one position, as float32; zeros outside."""
    return tl.load(X + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def decay_at(W, row, K, n, inside, WIDE: tl.constexpr):
    """Decays of one position, BK of them, whether there is one per key (WIDE) or one per head."""
    return tl.load(W + row * (K if WIDE else 1) + (n if WIDE else n * 0), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def advance(S, w, k, v, b, held):
    """The state after a position, `held` being what was recalled there."""
    return S * w[None, :] + held[:, None] * b[None, :] + v[:, None] * k[None, :]


@triton.jit
def delta_forward(
    R, W, KEYS, VALUES, A, B, FIRST, SAVE, Y, RECALL, STARTS, LAST, STATES,
    L, H, K, V, n_starts, n_states,
    T: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R, KEYS, A, B: b L H K; W the same or b L H 1; VALUES, Y, RECALL: b L H V; states float32.

    STARTS: b n_starts H V K, the states before every T-th position, or None. SAVE: L, the index of each position in
    STATES (b n_states H V K) or -1, or None. Grid: blocks of V x heads x batch, flattened.
    """
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    p = (pid % blocks) * BV + tl.arange(0, BV)
    head = pid // blocks % H
    batch = (pid // blocks // H).to(tl.int64)
    n = tl.arange(0, BK)
    here_n, here_p = n < K, p < V
    here = here_p[:, None] & here_n[None, :]
    at = p[:, None] * K + n[None, :]
    S = tl.zeros((BV, BK), tl.float32)
    if FIRST is not None:
        S = tl.load(FIRST + (batch * H + head) * V * K + at, mask=here, other=0.0)
    for t in range(L):
        if STARTS is not None:
            if t % T == 0:
                tl.store(STARTS + ((batch * n_starts + t // T) * H + head) * V * K + at, S, mask=here)
        row = (batch * L + t) * H + head
        v = numbers(VALUES, row * V + p, here_p)
        held = tl.sum(S * numbers(A, row * K + n, here_n)[None, :], 1)
        w = decay_at(W, row, K, n, here_n, WIDE)
        S = advance(S, w, numbers(KEYS, row * K + n, here_n), v, numbers(B, row * K + n, here_n), held)
        y = tl.sum(S * numbers(R, row * K + n, here_n)[None, :], 1)
        tl.store(Y + row * V + p, y.to(Y.dtype.element_ty), mask=here_p)
        tl.store(RECALL + row * V + p, held.to(RECALL.dtype.element_ty), mask=here_p)
        if SAVE is not None:
            save = tl.load(SAVE + t)
            if save >= 0:
                tl.store(STATES + ((batch * n_states + save) * H + head) * V * K + at, S, mask=here)
    tl.store(LAST + (batch * H + head) * V * K + at, S, mask=here)
