"""The depthwise convolution through numba: float32 on the CPU, one pass, where torch takes a pass per tap.

The values do not depend on whether SiLU follows in the same pass.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.causal_conv1d import torch as plain
from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.numba_compile import kernel, refusal, share
from hooked_mamba.ops.numba_functions import flat_rows, silu16, worth_it
from hooked_mamba.ops.numba_lanes import LANES, fma, load, prefetch, store


@kernel
@no_type_check
def _convolve(x, row, history, weight, bias, y, rows, silu, lo, hi):
    """y_t = sum_k weight_k x_{t+k} + bias; one unit is one position.

    x has b times `rows` rows that lie `row` apart; history is b h c, in front of each batch element; weight is k c, and
    y is b l c.
    """
    taps, width = weight.shape
    before = history.shape[1]
    length = before + rows - taps + 1
    flat, flat_history = weight.reshape(-1), history.reshape(-1)
    for unit in range(lo, hi):
        b, t = unit // length, unit % length
        first = (b * rows + t - before) * row
        for c in range(0, width, LANES):
            at = min(c, width - LANES)
            prefetch(x, first + (taps + 1) * row + at)  # the next rows come from far if a product has just written them
            value = load(bias, at)
            if taps == 4 and t >= before:  # the usual case, without an inner loop
                value = fma(load(x, first + at), load(flat, at), value)
                value = fma(load(x, first + row + at), load(flat, width + at), value)
                value = fma(load(x, first + 2 * row + at), load(flat, 2 * width + at), value)
                value = fma(load(x, first + 3 * row + at), load(flat, 3 * width + at), value)
            else:
                for k in range(taps):
                    if t + k < before:
                        x_k = load(flat_history, (b * before + t + k) * width + at)
                    else:
                        x_k = load(x, first + k * row + at)
                    value = fma(x_k, load(flat, k * width + at), value)
            store(y, unit * width + at, silu16(value) if silu else value)


@kernel
@no_type_check
def _one_position(x, weight, bias, y):
    """y_c = sum_k weight_ck x_kc + bias_c, the step of generation; bias may be empty, x is b k c and weight c k."""
    taps, width = x.shape[1:]
    for b in range(x.shape[0]):
        for c in range(width):
            value = bias[c] if bias.size else np.float32(0)
            for k in range(taps):
                value += x[b, k, c] * weight[c, k]
            y[b, c] = value


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The one output of as many inputs as there are taps, without gradients."""
    y = x.new_empty(x.shape[0], 1, x.shape[2])
    constants = (weight[:, 0].detach().numpy(), _NO_BIAS if bias is None else bias.detach().numpy())
    _one_position(x.detach().numpy(), *constants, y.numpy()[:, 0])
    return F.silu(y) if silu else y


_NO_BIAS = np.empty(0, np.float32)


class _CausalConv1d(torch.autograd.Function):
    """weight is k c, bias c, history b h c."""

    @staticmethod
    def forward(ctx, x: Tensor, history: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, history, weight, bias)
        ctx.silu = silu
        flat, _, row = flat_rows(x)
        y = x.new_empty(x.shape[0], history.shape[1] + x.shape[1] - weight.shape[0] + 1, x.shape[2])
        constants = (t.contiguous().numpy() for t in (history, weight, bias))
        arrays = (flat.numpy(), row, *constants, y.view(-1).numpy())
        share(_convolve, y.shape[0] * y.shape[1], y.numel(), (*arrays, x.shape[1], silu), ())
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(needed)
                for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
            ]
            x, history, weight, bias = leaves
            pre = plain.causal_conv1d(x, weight.t().unsqueeze(1), bias, history)
        if ctx.silu:
            dy = torch.ops.aten.silu_backward(dy, pre.detach())
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(pre, wanted, dy))
        return *(next(gradients) if leaf.requires_grad else None for leaf in leaves), None


def _fits_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are contiguous float32 of which no gradient is wanted."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    plain_numbers = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return plain_numbers and not gradient and not torch.compiler.is_compiling()


def _probe() -> None:
    x, row = (
        torch.zeros(1, 4, LANES, dtype=torch.float32, device="cpu"),
        torch.zeros(LANES, dtype=torch.float32, device="cpu"),
    )
    _CausalConv1d.apply(x, x[:, :0], x[0], row, False)


@backend("causal_conv1d", takes={"grad"}, refuses=lambda x, N: refusal(x, _probe))
def causal_conv1d(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c 1 k"],
    bias: Float[Tensor, " c"] | None,
    history: Float[Tensor, "b h c"] | None = None,
    silu: bool = False,
) -> Float[Tensor, "b m c"]:
    """Convolve; see `hooked_mamba.ops.causal_conv1d`."""
    if x.shape[1] == weight.shape[2] and history is None and _fits_step(x, weight, bias):
        return _step(x, weight, bias, silu)
    if not worth_it(x):
        return plain.causal_conv1d(x, weight, bias, history, silu)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    history = x.new_empty(x.shape[0], 0, x.shape[2]) if history is None else history
    return _CausalConv1d.apply(x, history, weight[:, 0].t().to(x.dtype), bias.to(x.dtype), silu)
