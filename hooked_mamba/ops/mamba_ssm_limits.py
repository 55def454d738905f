"""What the kernels of the package mamba_ssm cannot do, for both of its backends."""

from __future__ import annotations

import torch
from torch import Tensor


def refusal(x: Tensor, N: int) -> str | None:
    """Why they cannot run on x with N states per channel; None if they can."""
    if not x.is_cuda:
        return f"it needs a GPU, and x is on {x.device.type}"
    if x.dtype == torch.float64:
        return "it computes in float32, and x is float64"
    if N > 256:
        return f"it takes at most 256 states per channel, and N is {N}"
    return None
