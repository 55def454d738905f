"""SiLU and softplus."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import asked_of, choose

SMALL = 1 << 13
"""Numbers below which torch's own function is taken on a CPU, as every backend does there."""


def silu(x: Float[Tensor, "..."], *, backend: str | None = None) -> Float[Tensor, "..."]:
    """x sigmoid(x), elementwise; `backend` is one of `BACKENDS["silu"]`, "auto" or None."""
    if backend is None and x.numel() < SMALL and x.device.type == "cpu":
        return F.silu(x)
    return choose("silu", x, 1, asked_of(None, None, x), backend).run(x)


def softplus(x: Float[Tensor, "..."], *, backend: str | None = None) -> Float[Tensor, "..."]:
    """log(1 + e^x), elementwise; `backend` is one of `BACKENDS["softplus"]`, "auto" or None."""
    if backend is None and x.numel() < SMALL and x.device.type == "cpu":
        return F.softplus(x)
    return choose("softplus", x, 1, asked_of(None, None, x), backend).run(x)
