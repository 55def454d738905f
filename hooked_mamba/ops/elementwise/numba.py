"""SiLU and softplus through numba: float32 on the CPU, one pass each.

torch takes two to four times as long for softplus.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.elementwise import torch as plain
from hooked_mamba.ops.numba_compile import kernel, refusal, share
from hooked_mamba.ops.numba_functions import flat_rows, silu16, softplus16, worth_it
from hooked_mamba.ops.numba_lanes import LANES, load, store


@kernel
@no_type_check
def _map(x, y, row, width, softplus, lo, hi):
    """y = silu(x) or softplus(x) for the rows lo..hi of x, which lie `row` apart; those of y lie `width` apart."""
    for r in range(lo, hi):
        for c in range(0, width, LANES):
            at = min(c, width - LANES)  # the last block overlaps the one before it
            value = load(x, r * row + at)
            store(y, r * width + at, softplus16(value) if softplus else silu16(value))


def _elementwise(x: Tensor, softplus: bool) -> Tensor:
    flat, count, row = flat_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    share(_map, count, x.numel(), (flat.numpy(), y.view(-1).numpy(), row, x.shape[-1], softplus), ())
    return y


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, softplus: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.softplus = softplus
        return _elementwise(x.detach(), softplus)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (_softplus_gradient if ctx.softplus else _silu_gradient)(dy, x), None


_silu_gradient: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.silu_backward


def _softplus_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return dy * torch.sigmoid(x)


def _probe() -> None:
    _elementwise(torch.zeros(1, LANES, dtype=torch.float32, device="cpu"), False)


@backend("silu", takes={"grad"}, refuses=lambda x, N: refusal(x, _probe))
def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x sigmoid(x); see `hooked_mamba.ops.silu`."""
    return _Elementwise.apply(x, False) if worth_it(x) else plain.silu(x)


@backend("softplus", takes={"grad"}, refuses=lambda x, N: refusal(x, _probe))
def softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(1 + e^x); see `hooked_mamba.ops.softplus`."""
    return _Elementwise.apply(x, True) if worth_it(x) else plain.softplus(x)
