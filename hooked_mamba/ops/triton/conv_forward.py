"""The depthwise causal convolution, forward.

    y_t = silu( sum_k W_k x_{t+k+shift} + bias ),      rows outside x count as zeros

Sum and SiLU in float32. One program per tile of BT positions and BE channels; each reads its rows K times, from the
cache all but the first time. The gradient to x is the same sum with the taps reversed and shift = 1 - K.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taps_sum(X, W, b, t, e, inside, rows, E, x_row, shift, K: tl.constexpr):
    """sum_k W_k x_{t+k+shift} for a tile; W is K x E."""
    out = tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    for k in tl.static_range(K):
        s = t + k + shift
        here = ((s >= 0) & (s < rows))[:, None] & inside[None, :]
        x = tl.load(X + (b * rows + s)[:, None] * x_row + e[None, :], mask=here, other=0.0).to(tl.float32)
        out += x * tl.load(W + k * E + e, mask=inside, other=0.0)[None, :]
    return out


@triton.jit
def conv_forward(
    X, W, BIAS, Y, rows, L, E, x_row, shift,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """X: b rows E, rows x_row apart; W: K E and BIAS: E, float32; Y: b L E. Grid: channels x positions x batch."""
    columns, tiles = tl.cdiv(E, BE), tl.cdiv(L, BT)
    pid = tl.program_id(0)
    e = (pid % columns) * BE + tl.arange(0, BE)
    t = (pid // columns) % tiles * BT + tl.arange(0, BT)
    b = (pid // columns // tiles).to(tl.int64)
    inside = e < E
    y = taps_sum(X, W, b, t, e, inside, rows, E, x_row, shift, K)
    if BIAS is not None:
        y += tl.load(BIAS + e, mask=inside, other=0.0)[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    at = (b * L + t)[:, None] * E + e[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=(t < L)[:, None] & inside[None, :])
