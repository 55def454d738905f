"""The depthwise causal convolution on a GPU, with or without the SiLU that follows it."""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.causal_conv1d._triton_backward import conv_backward
from hooked_mamba.ops.causal_conv1d._triton_forward import conv_forward
from hooked_mamba.ops.triton_launch import on_device, row_major

BT, BE = 16, 128


def causal_conv1d(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c 1 k"],
    bias: Float[Tensor, " c"] | None,
    history: Float[Tensor, "b h c"] | None = None,
    silu: bool = False,
) -> Float[Tensor, "b m c"]:
    """Convolve; see `hooked_mamba.ops.causal_conv1d`."""
    return _CausalConv1d.apply(x, history, weight[:, 0].t().float(), None if bias is None else bias.float(), silu)


def _grid(batch: int, L: int, E: int) -> tuple[int]:
    return (triton.cdiv(E, BE) * triton.cdiv(L, BT) * batch,)


def _convolve(x, history, W, bias, L, shift, silu, dtype):
    """L positions of the sums over history and x, the first of which begins at row `shift`."""
    b, rows, E = x.shape
    H = 0 if history is None else history.shape[1]
    y = torch.empty(b, L, E, dtype=dtype, device=x.device)
    conv_forward[_grid(b, L, E)](
        x, history, W, bias, y, rows, H, L, E, x.stride(1), shift, K=W.shape[0], BT=BT, BE=BE, SILU=silu, num_warps=4
    )
    return y


class _CausalConv1d(torch.autograd.Function):
    """W is k c and float32, like the bias."""

    @staticmethod
    def forward(ctx, x, history, W, bias, silu):
        x, W = row_major(x), W.contiguous()
        history, bias = (None if t is None else t.contiguous() for t in (history, bias))
        ctx.save_for_backward(x, history, W, bias)
        ctx.silu = silu
        rows = x.shape[1] + (0 if history is None else history.shape[1])
        with on_device(x):
            return _convolve(x, history, W, bias, rows - W.shape[0] + 1, 0, silu, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, history, W, bias = ctx.saved_tensors
        dy = dy.contiguous()
        b, L, E = dy.shape
        rows, K = x.shape[1], W.shape[0]
        H = 0 if history is None else history.shape[1]
        dpre = dy
        dx = dhistory = dW = db = None
        with on_device(x):
            if ctx.silu or any(ctx.needs_input_grad[2:4]):
                dpre = W.new_empty(dy.shape) if ctx.silu else dy
                tiles = triton.cdiv(L, BT) * b
                dW, db = W.new_empty(tiles, K, E), W.new_empty(tiles, E)
                conv_backward[_grid(b, L, E)](
                    x, history, W, bias, dy, dpre if ctx.silu else None, dW, db, rows, H, L, E, x.stride(1),
                    K=K, BT=BT, BE=BE, SILU=ctx.silu, num_warps=4,
                )  # fmt: skip
                dW, db = dW.sum(0), None if bias is None else db.sum(0)
            if ctx.needs_input_grad[0]:
                dx = _convolve(dpre, None, W.flip(0), None, rows, H + 1 - K, False, x.dtype)
            if ctx.needs_input_grad[1]:
                dhistory = _convolve(dpre, None, W.flip(0), None, H, 1 - K, False, history.dtype)
        return dx, dhistory, dW, db, None
