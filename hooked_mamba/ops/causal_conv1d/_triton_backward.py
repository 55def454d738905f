"""The depthwise causal convolution, backward: gradients to the taps, the bias and what enters the SiLU.

    dpre_t = dy_t silu'(pre_t),      dW_k = sum_{b,t} dpre_t x_{t+k},      dbias = sum_{b,t} dpre_t

pre is computed again. Sums over positions are written as one part per tile and added up afterwards. The gradient to x
follows from dpre with `conv_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hooked_mamba.ops.causal_conv1d._triton_forward import rows_at, taps_sum


@triton.jit
def conv_backward(
    X, HISTORY, W, BIAS, DY, DPRE, DW, DBIAS, rows, H, L, E, x_row,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """DPRE: b L E, float32, None without SILU. DW: tiles K E, DBIAS: tiles E. Grid as in `conv_forward`."""
    columns, tiles = tl.cdiv(E, BE), tl.cdiv(L, BT)
    pid = tl.program_id(0)
    e = (pid % columns) * BE + tl.arange(0, BE)
    t = (pid // columns) % tiles * BT + tl.arange(0, BT)
    tile = (pid // columns).to(tl.int64)
    b = tile // tiles
    inside = e < E
    here = (t < L)[:, None] & inside[None, :]
    at = (b * L + t)[:, None] * E + e[None, :]
    dpre = tl.load(DY + at, mask=here, other=0.0).to(tl.float32)
    if SILU:
        pre = taps_sum(X, HISTORY, W, b, t, e, inside, rows, H, E, x_row, 0, K)
        if BIAS is not None:
            pre += tl.load(BIAS + e, mask=inside, other=0.0)[None, :]
        gate = tl.sigmoid(pre)
        dpre *= gate * (1.0 + pre * (1.0 - gate))
        tl.store(DPRE + at, dpre, mask=here)
    for k in tl.static_range(K):
        x = rows_at(X, HISTORY, b, t + k, e, inside, rows, H, E, x_row)  # dpre is 0 past the last position
        tl.store(DW + (tile * K + k) * E + e, tl.sum(dpre * x, 0), mask=inside)
    tl.store(DBIAS + tile * E + e, tl.sum(dpre, 0), mask=inside)
