"""The depthwise causal convolution."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import asked_of, choose


def causal_conv1d(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c 1 k"],
    bias: Float[Tensor, " c"] | None,
    *,
    history: Float[Tensor, "b h c"] | None = None,
    silu: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "b m c"]:
    """Depthwise convolution, out_t = sum_k weight[k] x_{t+k} + bias, m = h + l - k + 1 positions long.

    With the k-1 inputs before the sequence (zeros at its start) as `history` this is causal.

    Parameters
    ----------
    history
        Inputs in front of x; None where x holds them itself.
    silu
        Apply SiLU as well, in the same pass where the backend can: for callers that look at nothing in between.
    backend
        One of `BACKENDS["causal_conv1d"]`, "auto" or None.

    Raises
    ------
    ValueError
        x with its history is shorter than the kernel, or there is no backend of that name.
    """
    op = "causal_conv1d"
    rows = x.shape[1] + (0 if history is None else history.shape[1])
    if rows < weight.shape[-1]:
        raise ValueError(f"{op}: x and its history have {rows} positions, expected at least k={weight.shape[-1]}")
    chosen = choose(op, x, 1, asked_of(None, None, x, history, weight, bias), backend)
    return chosen.run(x, weight, bias, history, silu)
