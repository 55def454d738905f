"""Matrix products of linear layers: on a CPU in float32 through oneDNN or numba, elsewhere torch's own.

torch multiplies float32 matrices on a CPU with MKL, which on AMD processors runs at half the speed of oneDNN. torch
brings oneDNN along and calls it in compiled models, through the operator used here; it has no gradient of its own.
A single row, as in a step of generation, goes through :mod:`hooked_mamba.ops.numba_row` where there is numba.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALL = 2**20
"""Multiplications below which the choice does not matter and torch's own product is taken."""
MANY = 256
"""Rows from which on a matrix is turned round for oneDNN."""


def linear(
    x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "... o"]:
    """x W^T + bias; a bias of another type than the weight's is added in its own.

    Neither oneDNN nor numba is taken inside torch.compile, nor with `torch.backends.mkldnn.flags(enabled=False)`.
    """
    if bias is not None and bias.dtype != weight.dtype:
        return linear(x, weight).to(bias.dtype) + bias
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.numel() == x.shape[-1] and not gradient and _by_numba(x, weight) and (rows := _rows()):
        return rows.row_times(x, weight, bias)
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if gradient:
        out = _Product.apply(x, weight)
        return out if bias is None else out + bias
    return _product(x, weight, bias)


def times(x: Float[Tensor, "... i"], matrix: Float[Tensor, "i o"]) -> Float[Tensor, "... o"]:
    """x M for a matrix whose rows are inputs, such as a linear layer's weight in a covector's way back.

    oneDNN wants it turned round, which pays from :data:`MANY` rows of x on.
    """
    many = x.numel() >= MANY * x.shape[-1] and _by_onednn(x, matrix)
    return linear(x, matrix.t()) if many else x @ matrix


def root_mean_square(x: Float[Tensor, "... n"], eps: float) -> Float[Tensor, "... 1"]:
    """sqrt(mean x^2 + eps) over the last axis."""
    one_row = x.numel() == x.shape[-1] and not (torch.is_grad_enabled() and x.requires_grad)
    if one_row and _by_numba(x, x) and (rows := _rows()):
        return rows.row_scale(x, eps)
    return (squares(x).mean(-1, keepdim=True) + eps).sqrt()


def squares(x: Tensor) -> Tensor:
    """x^2. The product is the faster one; the power's gradient is one number, and not two to be summed."""
    return x.square() if x.requires_grad else x * x


@cache
def _rows() -> Any:
    """What is done to one row by numba; None where it is missing or cannot compile it."""
    try:
        from hooked_mamba.ops import numba_row
    except ImportError:
        return None
    return numba_row if numba_row.works() else None


def _by_numba(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= SMALL
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, by rows of x."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], None)


class _Product(torch.autograd.Function):
    """x W^T; dx = dy W; dW = dy^T x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = _product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = _product(dy.flatten(0, -2).t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return dx, dw
