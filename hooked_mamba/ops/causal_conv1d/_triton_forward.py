"""The depthwise causal convolution, forward.

    y_t = silu( sum_k W_k x_{t+k+shift} + bias ),      rows outside x count as zeros

Here x is what a history of H rows and the rows of X make up one after the other; nothing joins them in memory.
Sum and SiLU in float32. One program per tile of BT positions and BE channels; each reads its rows K times, from the
cache all but the first time. The gradient to x is the same sum with the taps reversed and shift = 1 - K.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_at(X, HISTORY, b, s, e, inside, rows, H, E, x_row):
    """Rows s of the history (b H E) and of X after it, as float32; zeros outside."""
    here = ((s >= H) & (s < H + rows))[:, None] & inside[None, :]
    x = tl.load(X + (b * rows + s - H)[:, None] * x_row + e[None, :], mask=here, other=0.0).to(tl.float32)
    if HISTORY is not None:
        here = ((s >= 0) & (s < H))[:, None] & inside[None, :]
        x += tl.load(HISTORY + (b * H + s)[:, None] * E + e[None, :], mask=here, other=0.0).to(tl.float32)
    return x


@triton.jit
def taps_sum(X, HISTORY, W, b, t, e, inside, rows, H, E, x_row, shift, K: tl.constexpr):
    """sum_k W_k x_{t+k+shift} for a tile; W is K x E."""
    out = tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    for k in tl.static_range(K):
        x = rows_at(X, HISTORY, b, t + k + shift, e, inside, rows, H, E, x_row)
        out += x * tl.load(W + k * E + e, mask=inside, other=0.0)[None, :]
    return out


@triton.jit
def conv_forward(
    X, HISTORY, W, BIAS, Y, rows, H, L, E, x_row, shift,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid: channels x positions x batch, flattened, channels fastest.

    X: b rows E, rows x_row apart; HISTORY: b H E, or None and H = 0; W: K E and BIAS: E, float32; Y: b L E.
    """
    columns, tiles = tl.cdiv(E, BE), tl.cdiv(L, BT)
    pid = tl.program_id(0)
    e = (pid % columns) * BE + tl.arange(0, BE)
    t = (pid // columns) % tiles * BT + tl.arange(0, BT)
    b = (pid // columns // tiles).to(tl.int64)
    inside = e < E
    y = taps_sum(X, HISTORY, W, b, t, e, inside, rows, H, E, x_row, shift, K)
    if BIAS is not None:
        y += tl.load(BIAS + e, mask=inside, other=0.0)[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    at = (b * L + t)[:, None] * E + e[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=(t < L)[:, None] & inside[None, :])
