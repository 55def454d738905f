"""The training loss of a coder.

    mse      mean over examples of |y - y_hat|^2            (matryoshka: and over its prefixes)
    aux      mean |e - e_hat|^2, e = y - y_hat without gradient, e_hat = what the k_aux strongest dead latents decode to
             without b_dec: a gradient, into the encoder too, for latents that never fire (Gao et al. 2024, AuxK)
    penalty  the architecture's sparsity penalty: L1 in units of the reconstruction, or the number of latents
    extra    the gated coder's reconstruction from its gate alone, with a frozen decoder
    wide     topk, batchtopk: the mse with twice as many latents (Multi-TopK of the same paper, which takes four times
             as many). An example with more than k features is not forced into k latents
    total    mse + aux_alpha aux + sparsity penalty + extra + wide_alpha wide

All is computed in the coder's own units, after cfg.input_norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mamba.ops.products import linear
from saes.activations.base import affine
from saes.activations.matryoshka import prefixes
from saes.activations.topk import topk
from saes.coder import SparseCoder
from saes.loss_state import LossState as LossState
from saes.sparse import Pattern, decode, encode

SPARSE_AUX = 8
"""Dead latents per chosen one from which sparse products are faster."""


class Losses(NamedTuple):
    """The loss and its parts, each a scalar; all but `total` without gradient."""

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    extra: Float[Tensor, ""]
    wide: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    """Active latents per example."""
    fvu: Float[Tensor, ""]
    """Share of the batch's variance that is not explained."""
    fired: Bool[Tensor, " F"]
    """Which latents were active anywhere in the batch."""
    least: Float[Tensor, ""] | None
    """The smallest active value (batchtopk, matryoshka)."""


def loss(coder: SparseCoder, x: Float[Tensor, "*b d_in"], y: Float[Tensor, "*b d_out"], state: LossState) -> Losses:
    """The loss of one batch; `x` and `y` as they come from the model (the same for an SAE).

    The state is only read: after the step, call ``state.observe(coder, losses.fired, tokens, losses.least)``.
    """
    if state.wide_alpha and coder.cfg.architecture not in ("topk", "batchtopk"):
        raise ValueError(f"wide_alpha is for topk and batchtopk, this is {coder.cfg.architecture}")
    rows = coder._rows(x)
    y = y.reshape(-1, coder.cfg.d_out).to(rows.dtype)
    if coder.cfg.input_norm == "scale":
        y = y * coder.s_out
    latents = coder.activation.train(coder, rows, state)
    base: Tensor = coder.b_dec
    if coder.W_skip is not None:
        base = base + (x.reshape(len(rows), -1).to(rows.dtype) * getattr(coder, "s_in", 1.0)) @ coder.W_skip
    if coder.cfg.matryoshka_widths is not None:
        nested = prefixes(latents, coder.W_dec, coder.cfg.matryoshka_widths)
        errors = [y - (part + base) for part in nested]
    else:
        errors = [y - (latents.decode(coder.W_dec) + base)]
    mse = torch.stack([e.square().sum(1).mean() for e in errors]).mean()
    zero = mse.new_zeros(())
    aux = _aux(coder, rows, errors[-1].detach(), state) if state.aux_alpha else zero
    extra = zero
    if latents.gate is not None:
        frozen = latents.decode(coder.W_dec.detach(), latents.gate) + base.detach()
        extra = (y - frozen).square().sum(1).mean()
    wide = zero
    if latents.rest is not None:
        wide = (errors[-1] - latents.rest.decode(coder.W_dec)).square().sum(1).mean()
    penalty = zero if latents.penalty is None else latents.penalty
    total = mse + state.aux_alpha * aux + state.sparsity * penalty + extra + state.wide_alpha * wide
    with torch.no_grad():
        variance = (y - y.mean(0)).square().sum(1).mean()
        fvu = errors[-1].square().sum(1).mean() / variance
        mse, aux, penalty, extra, wide = (part.detach() for part in (mse, aux, penalty, extra, wide))
        fired = latents.fired(coder.cfg.d_sae)
        return Losses(total, mse, aux, penalty, extra, wide, latents.l0(), fvu, fired, latents.least)


def _aux(coder: SparseCoder, x: Tensor, error: Tensor, state: LossState) -> Tensor:
    """How badly the strongest dead latents reconstruct the error."""
    dead = state.dead.nonzero().squeeze(1)
    if len(dead) == 0:
        return error.new_zeros(())
    wanted = state.aux_k or coder.cfg.k or max(1, coder.cfg.d_out // 2)
    k = min(len(dead), wanted)
    W_enc, b = coder.W_enc.t()[dead], coder.encoder_bias[dead]
    x = x.detach()  # the dead latents' loss does not train b_dec
    if len(dead) < SPARSE_AUX * k:
        pre = affine(x, W_enc.t(), b)
        values, indices = pre.topk(k, sorted=False)
        z = torch.zeros_like(pre).scatter(1, indices, values.relu())
        said = linear(z.unsqueeze(0), coder.W_dec[dead].t()).squeeze(0)
    else:
        with torch.no_grad():
            values, indices = topk(affine(x, W_enc.t(), b), k)
        pattern = Pattern.of_codes(indices, len(dead))
        pre = encode(x, W_enc.t(), b, values.flatten(), pattern)
        said = decode(pre.relu(), pattern, coder.W_dec[dead])
    # Few dead latents can explain only little of the error: they should not be driven as hard (sparsify's scale).
    return k / wanted * (error - said).square().sum(1).mean()
