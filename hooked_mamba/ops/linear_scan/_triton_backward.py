"""The first-order scan, backward: the same scan from the end, with the decays shifted by one position.

    g_t = dh_t + a_{t+1} g_{t+1},      db_t = g_t,      da_t = g_t h_{t-1},      dh0 = a_1 g_1

Tiles and programs are those of `linear_forward`, from the last tile to the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.linear_scan._triton_forward import compose


@triton.jit
def linear_backward(
    A, H, H0, DH, DA, DB, DH0, L, columns, n_tiles,
    T: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of BC columns x batch, flattened. DA, H may be None together if no gradient to a is wanted."""
    blocks = tl.cdiv(columns, BC)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    inside = c < columns
    t = tl.arange(0, T)
    entering = tl.zeros((BC,), tl.float32)  # a_{t+1} g_{t+1} from the tile to the right
    for back in range(n_tiles):
        rows = (n_tiles - 1 - back) * T + t
        at = (b * L + rows)[:, None] * columns + c[None, :]
        valid = (rows < L)[:, None] & inside[None, :]
        a = tl.load(A + at, mask=valid, other=1.0)
        inner = valid & (t < T - 1)[:, None] & (rows + 1 < L)[:, None]
        a_next = tl.load(A + at + columns, mask=inner, other=1.0)  # 1 in the last row: `entering` holds a g
        dh = tl.load(DH + at, mask=valid, other=0.0)
        decay, part = tl.associative_scan((a_next, dh), 0, compose, reverse=True)
        g = decay * entering[None, :] + part
        tl.store(DB + at, g, mask=valid)
        if DA is not None:
            before = tl.load(H + at - columns, mask=valid & (rows > 0)[:, None], other=0.0)
            if H0 is not None:
                first = tl.load(H0 + b * columns + c, mask=inside, other=0.0)
                before = tl.where((rows == 0)[:, None], first[None, :], before)
            tl.store(DA + at, g * before, mask=valid)
        entering = tl.sum(tl.where(t[:, None] == 0, a * g, 0.0), 0)
    if DH0 is not None:
        tl.store(DH0 + b * columns + c, entering, mask=inside)
