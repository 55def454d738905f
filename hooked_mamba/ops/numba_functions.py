"""SiLU and softplus of sixteen numbers, and what kernels that go over rows of float32 share."""

from __future__ import annotations

from typing import no_type_check

import numba
import torch
from torch import Tensor

from hooked_mamba.ops.elementwise.op import SMALL
from hooked_mamba.ops.numba_lanes import LANES, div, exp, fma, minus_abs, mul, positive, splat

ONE, TWO, MINUS_ONE = numba.float32(1), numba.float32(2), numba.float32(-1)
ATANH = tuple(numba.float32(1 / n) for n in (13, 11, 9, 7, 5, 3))
"""atanh(s) = s (1 + s^2 (1/3 + s^2 (1/5 + ...))); at s = 1/3 what is cut off is 1.4e-8 of it."""


def worth_it(x: Tensor) -> bool:
    """Whether x is float32, wide and large enough for these kernels; torch's own are taken where it is not."""
    wide = x.dtype == torch.float32 and x.numel() >= SMALL and x.shape[-1] >= LANES
    return wide and not torch.compiler.is_compiling()


def flat_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x as a flat view from its first number to its last, the count of its rows and how far apart they lie."""
    rows = (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, -2)
    span = (rows.shape[0] - 1) * rows.stride(0) + rows.shape[1]
    return rows.as_strided((span,), (1,)), rows.shape[0], rows.stride(0)


@numba.njit
@no_type_check
def silu16(x):
    """x sigmoid(x) of sixteen numbers."""
    return div(x, fma(splat(ONE), splat(ONE), exp(mul(x, splat(MINUS_ONE)))))


@numba.njit
@no_type_check
def softplus16(x):
    """max(x, 0) + log1p(u), u = exp(-|x|); log1p(u) = 2 atanh(u / (2 + u)), exact for tiny u as well."""
    u = exp(minus_abs(x))
    s = div(u, fma(splat(ONE), splat(TWO), u))
    square = mul(s, s)
    series = splat(ATANH[0])
    for i in range(1, 6):
        series = fma(series, square, splat(ATANH[i]))
    series = fma(series, square, splat(ONE))
    return fma(mul(s, splat(TWO)), series, positive(x))
