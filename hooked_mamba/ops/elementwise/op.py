"""SiLU and softplus."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import asked_of, choose


def silu(x: Float[Tensor, "..."], *, backend: str | None = None) -> Float[Tensor, "..."]:
    """x sigmoid(x), elementwise; `backend` is one of `BACKENDS["silu"]`, "auto" or None."""
    return choose("silu", x, 1, asked_of(None, None, x), backend).run(x)


def softplus(x: Float[Tensor, "..."], *, backend: str | None = None) -> Float[Tensor, "..."]:
    """log(1 + e^x), elementwise; `backend` is one of `BACKENDS["softplus"]`, "auto" or None."""
    return choose("softplus", x, 1, asked_of(None, None, x), backend).run(x)
