"""How training starts, and the constraints that hold after each step."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saes.coder import SparseCoder


@torch.no_grad()
def geometric_median(y: Float[Tensor, "n d"], steps: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d"]:
    """The point with the least mean distance to all rows, by Weiszfeld's iteration."""
    median = y.mean(0)
    for _ in range(steps):
        weights = 1 / (y - median).norm(dim=1).clamp(min=1e-12)
        after = (weights @ y) / weights.sum()
        moved = (after - median).norm()
        median = after
        if moved <= tolerance * median.norm().clamp(min=tolerance):
            break
    return median


@torch.no_grad()
def initialise(
    coder: SparseCoder,
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"] | None = None,
    *,
    b_dec: str = "mean",
) -> SparseCoder:
    """Fit to a sample of activations: the scales of cfg.input_norm, and b_dec.

    Parameters
    ----------
    x, y
        A few thousand examples; an SAE needs no y.
    b_dec
        "mean" or "median" (geometric) of the target, or "zero".
    """
    choices = ("mean", "median", "zero")
    if b_dec not in choices:
        raise ValueError(f"b_dec must be one of {', '.join(choices)}, got {b_dec!r}")
    x = x.reshape(-1, coder.cfg.d_in).to(coder.W_dec.dtype)
    y = x if y is None else y.reshape(-1, coder.cfg.d_out).to(coder.W_dec.dtype)
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("activations to initialise from hold NaN or infinity")
    if coder.cfg.input_norm == "scale":
        for scale, values in ((coder.s_in, x), (coder.s_out, y)):
            square = values.square().sum(1).mean()
            if square == 0:
                raise ValueError("activations to initialise from are all zero")
            scale.copy_((values.shape[1] / square).sqrt())
        y = y * coder.s_out
    if b_dec != "zero":
        coder.b_dec.copy_(y.mean(0) if b_dec == "mean" else geometric_median(y))
    return coder


@torch.no_grad()
def unit_decoder(coder: SparseCoder) -> None:
    """Scale every decoder row to norm 1, in place."""
    coder.W_dec.div_(coder.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))


@torch.no_grad()
def project_decoder_gradient(coder: SparseCoder) -> None:
    """Remove from the decoder's gradient what would change its rows' norms, in place."""
    grad, W = coder.W_dec.grad, coder.W_dec
    if grad is None:
        return
    along = torch.bmm(grad.unsqueeze(1), W.unsqueeze(2)).squeeze(2) / W.norm(dim=1, keepdim=True).square().clamp(
        min=1e-24
    )
    grad.addcmul_(W, -along)


@torch.no_grad()
def after_step(coder: SparseCoder, decoder_norm: bool = True) -> None:
    """What must hold after the optimiser's step: unit decoder rows if wanted, thresholds not below 0."""
    if decoder_norm:
        unit_decoder(coder)
    if coder.cfg.architecture == "jumprelu":
        coder.threshold.clamp_(min=0)
