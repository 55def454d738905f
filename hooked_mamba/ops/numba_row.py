"""One row times a matrix, the linear layers of a step of generation: float32 on the CPU.

Such a product takes as long as the weights take to come from memory. Each of their rows is read once, from front to
back, into four sums of sixteen numbers and what is left over; MKL and oneDNN ask for more than one row at a time and
wait longer.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
import torch
from torch import Tensor

from hooked_mamba.ops.numba_compile import broken, kernel, share
from hooked_mamba.ops.numba_lanes import LANES, add, fma, load, prefetch, splat, total

AHEAD = 512
"""How far ahead of the sums weights are asked for, in numbers."""

WORTH_A_THREAD = 4
"""Weights that are read in the time of one exponential, by which work is counted."""


@kernel
@no_type_check
def _times(W, x, bias, y, lo, hi):
    """y = W x + bias for the rows lo..hi of W; bias may be empty."""
    n = x.size
    W = W.reshape(-1)
    fours, ones = n // (4 * LANES) * (4 * LANES), n // LANES * LANES
    zero = splat(np.float32(0))
    for r in range(lo, hi):
        a, b, c, d, row = zero, zero, zero, zero, r * n
        for i in range(0, fours, 4 * LANES):
            at = row + i
            for k in range(4):
                prefetch(W, at + AHEAD + k * LANES)
            a = fma(load(W, at), load(x, i), a)
            b = fma(load(W, at + LANES), load(x, i + LANES), b)
            c = fma(load(W, at + 2 * LANES), load(x, i + 2 * LANES), c)
            d = fma(load(W, at + 3 * LANES), load(x, i + 3 * LANES), d)
        for i in range(fours, ones, LANES):
            a = fma(load(W, row + i), load(x, i), a)
        out = total(add(add(a, b), add(c, d)))
        for i in range(ones, n):
            out += W[row + i] * x[i]
        y[r] = out + bias[r] if bias.size else out


@kernel
@no_type_check
def _squares(x):
    """The sum of x^2."""
    zero = splat(np.float32(0))
    a, b, ones = zero, zero, x.size // LANES * LANES
    for i in range(0, x.size // (2 * LANES) * (2 * LANES), 2 * LANES):
        a = fma(load(x, i), load(x, i), a)
        b = fma(load(x, i + LANES), load(x, i + LANES), b)
    for i in range(x.size // (2 * LANES) * (2 * LANES), ones, LANES):
        a = fma(load(x, i), load(x, i), a)
    out = total(add(a, b))
    for i in range(ones, x.size):
        out += x[i] * x[i]
    return out


def row_scale(x: Tensor, eps: float) -> Tensor:
    """sqrt(mean x^2 + eps) of one contiguous row, with an axis of size 1 for the one summed over."""
    mean = _squares(x.numpy().reshape(-1)) / x.shape[-1]
    return x.new_full((*x.shape[:-1], 1), (mean + eps) ** 0.5)


_NO_BIAS = np.empty(0, np.float32)


def _probe() -> None:
    x = torch.zeros(LANES, dtype=torch.float32, device="cpu")
    row_times(x, x[None], None)
    row_scale(x, 1.0)


def works() -> bool:
    """Whether this machine's numba compiles it."""
    return broken(_probe) is None


def row_times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias, in the shape of x but for its last axis; x holds one row, contiguous like the weight."""
    rows, n = weight.shape
    y = x.new_empty((*x.shape[:-1], rows))
    flat_x, flat_y = x.detach().numpy().reshape(-1), y.numpy().reshape(-1)
    arrays = (weight.detach().numpy(), flat_x, _NO_BIAS if bias is None else bias.detach().numpy(), flat_y)
    share(_times, rows, rows * n // WORTH_A_THREAD, arrays, ())
    return y
