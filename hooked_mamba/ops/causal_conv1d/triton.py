"""The depthwise convolution on a GPU, in Triton; the kernels are imported at the first call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.triton_support import refusal


@backend("causal_conv1d", takes={"grad"}, refuses=refusal)
def causal_conv1d(*arguments: Any, **options: Any) -> Tensor:
    """See `hooked_mamba.ops.causal_conv1d`."""
    from hooked_mamba.ops.causal_conv1d import _triton_conv

    return _triton_conv.causal_conv1d(*arguments, **options)
