"""The first-order recurrence as a loop over positions, differentiated by autograd."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend


@backend("linear_scan", takes={"h0", "grad"})
def linear_scan(
    a: Float[Tensor, "..."], b: Float[Tensor, "b l *rest"], *, h0: Float[Tensor, "..."] | None
) -> Float[Tensor, "b l *rest"]:
    """First-order recurrence h_t = a_t h_{t-1} + b_t over axis 1."""
    a = a.expand_as(b)
    h, out = h0, []
    for t in range(b.shape[1]):
        h = b[:, t] if h is None else a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)
