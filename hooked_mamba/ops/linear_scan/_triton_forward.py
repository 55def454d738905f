"""The first-order scan h_t = a_t h_{t-1} + b_t, forward, on tiles of positions.

Inside a tile of T positions and BC columns the scan is parallel: (a, b) pairs compose by

    (a1, b1) then (a2, b2)  =  (a1 a2, a2 b1 + b2)

(Blelloch 1990, section 1.4). Tiles follow one another, the last state of one entering the next. One program per
BC columns; the work is little next to the bytes of a, b and h, which are each moved once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compose(a1, b1, a2, b2):
    """First (a1, b1), then (a2, b2)."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def linear_forward(A, B, H0, H, L, columns, n_tiles, T: tl.constexpr, BC: tl.constexpr):
    """Grid: blocks of BC columns x batch, flattened. A, B, H: b L columns, H0: b columns or None; all float32."""
    blocks = tl.cdiv(columns, BC)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    inside = c < columns
    t = tl.arange(0, T)
    state = tl.zeros((BC,), tl.float32)
    if H0 is not None:
        state = tl.load(H0 + b * columns + c, mask=inside, other=0.0)
    for tile in range(n_tiles):
        rows = tile * T + t
        at = (b * L + rows)[:, None] * columns + c[None, :]
        valid = (rows < L)[:, None] & inside[None, :]
        a = tl.load(A + at, mask=valid, other=1.0)
        u = tl.load(B + at, mask=valid, other=0.0)
        decay, part = tl.associative_scan((a, u), 0, compose)
        h = decay * state[None, :] + part
        tl.store(H + at, h, mask=valid)
        state = tl.sum(tl.where(t[:, None] == T - 1, h, 0.0), 0)
