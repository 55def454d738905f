"""SiLU and softplus as torch has them."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend


@backend("silu", takes={"grad"})
def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x sigmoid(x); see `hooked_mamba.ops.silu`."""
    return F.silu(x)


@backend("softplus", takes={"grad"})
def softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(1 + e^x); see `hooked_mamba.ops.softplus`."""
    return F.softplus(x)
