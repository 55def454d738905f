"""The depthwise causal convolution in plain torch, as a sum of shifted products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend


@backend("causal_conv1d", takes={"grad"})
def causal_conv1d(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c 1 k"],
    bias: Float[Tensor, " c"] | None,
    history: Float[Tensor, "b h c"] | None = None,
    silu: bool = False,
) -> Float[Tensor, "b m c"]:
    """Convolve; see `hooked_mamba.ops.causal_conv1d`."""
    if history is not None:
        x = torch.cat([history, x], 1)
    taps = weight.shape[-1]
    length = x.shape[1] - taps + 1
    if length == 1:
        out = (x * weight[:, 0].t()).sum(1, keepdim=True)
        out = out if bias is None else out + bias
        return F.silu(out) if silu else out
    kernel = (
        weight[:, 0].t().contiguous()
    )  # a row of taps after the other: products with strided ones take five times as long
    # Shifted products stay in the layout of x; F.conv1d would transpose there and back.
    out = x[:, :length] * kernel[0] if bias is None else torch.addcmul(bias, x[:, :length], kernel[0])
    for k in range(1, taps):
        out.addcmul_(x[:, k : k + length], kernel[k])
    return F.silu(out) if silu else out
