"""One pass of a model with coders in place of its sites, and the gradients that fine-tuning takes from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.loss_state import LossState
from saes.rewriting import Rewrite, rewritten
from saes.store.rows import Rows


class Pass(NamedTuple):
    """One pass of the model with all coders in place."""

    kl: Float[Tensor, ""]
    """KL(clean || spliced), the mean over real positions, nats."""
    fvu: dict[str, Float[Tensor, ""]]
    """Each coder's share of the variance that it misses."""
    l0: dict[str, Float[Tensor, ""]]
    """Its active latents a position."""
    seen: dict[str, Float[Tensor, "n d_in"]]
    """What it read, without gradient."""


def spliced_pass(model: HookedModel, coders: Mapping[str, SparseCoder], rows: Rows) -> Pass:
    """The losses of some rows, with gradients for the coders."""
    fvu: dict[str, Tensor] = {}
    l0: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def replacing(name: str, coder: SparseCoder) -> Rewrite:
        def new(x: Tensor, y: Tensor) -> Tensor:
            read, wanted = x[rows.real], y[rows.real].detach().to(coder.dtype)
            latents = coder.activation.train(coder, coder._rows(read), LossState.of(coder))
            found = coder._finish(latents.decode(coder.W_dec), read)
            variance = (wanted - wanted.mean(0)).square().sum(1).mean()
            fvu[name] = (wanted - found).square().sum(1).mean() / variance
            l0[name], seen[name] = latents.l0(), read.detach()
            said = y.to(coder.dtype).clone()
            said[rows.real] = found
            return said

        return Rewrite(coder.cfg, new)

    with torch.no_grad():
        clean = model(rows.tokens, **rows.arguments())[rows.real].log_softmax(-1)
    with rewritten(model, [replacing(name, coder) for name, coder in coders.items()]):
        spliced = model(rows.tokens, **rows.arguments())[rows.real].log_softmax(-1)
    kl = nn.functional.kl_div(spliced, clean, log_target=True, reduction="batchmean")
    return Pass(kl, fvu, l0, seen)


@torch.no_grad()
def along_spheres(coder: SparseCoder) -> None:
    """Take out of the decoder's gradient what would change its rows' norms, in place."""
    grad, W = coder.W_dec.grad, coder.W_dec
    if grad is not None:
        grad.sub_((grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True).clamp(min=1e-24) * W)


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """The model's weights without gradients, as they were afterwards; gradients on for the coders."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
