"""The first-order recurrence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops import checks
from hooked_mamba.ops.choose import asked_of, choose


def linear_scan(
    a: Float[Tensor, "..."],
    b: Float[Tensor, "b l *rest"],
    *,
    h0: Float[Tensor, "..."] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b l *rest"]:
    """The first-order recurrence h_t = a_t h_{t-1} + b_t over axis 1.

    Parameters
    ----------
    a
        Decays, anything that broadcasts to b; may be 0 or negative.
    b
        Inputs, b l and any further axes.
    h0
        State before the first position, shaped like b without its axis l; None for zeros.
    backend
        One of `BACKENDS["linear_scan"]`, "auto" or None.

    Returns
    -------
    Tensor
        h at every position, shaped like b. It is kept for the backward: do not write into it.

    Raises
    ------
    ValueError
        A shape or a backend's name does not fit.
    """
    op = "linear_scan"
    if b.ndim < 2:
        raise ValueError(f"{op}: b has shape {tuple(b.shape)}, expected at least the axes b and l")
    checks.expect_length(op, b.shape[1])
    try:
        fits = torch.broadcast_shapes(a.shape, b.shape) == b.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{op}: a has shape {tuple(a.shape)}, which does not broadcast to {tuple(b.shape)}")
    wanted = (b.shape[0], *b.shape[2:])
    if h0 is not None and tuple(h0.shape) != wanted:
        raise ValueError(f"{op}: h0 has shape {tuple(h0.shape)}, expected {wanted}")
    return choose(op, b, 1, asked_of(h0, None, a, b), backend).run(a, b, h0=h0)
