"""Where the Triton backends run, said without importing triton, which takes a while and which most machines lack."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor


def refusal(x: Tensor, N: int) -> str | None:
    """Why Triton cannot run on x; None if it can.

    With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, number by number, which is how they are
    tested without a GPU.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32, and x is {str(x.dtype).removeprefix('torch.')}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, and x is on {x.device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None
