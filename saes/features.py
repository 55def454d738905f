"""The tokens that a latent promotes and suppresses, and the latents with the most similar weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.display import table
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.splicing import check_features
from saes.targets import streams_of

IN_RESIDUAL = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Sites that are the residual stream, by their names in a block."""


@dataclass(frozen=True)
class FeatureLogits:
    """Tokens that latents promote and suppress, at activation 1 and without the final norm's scale."""

    features: tuple[int, ...]
    promoted: tuple[tuple[tuple[str | int, float], ...], ...]
    """For each latent, tokens and the change of their logits, largest first. Ids where the model has no tokenizer."""
    suppressed: tuple[tuple[tuple[str | int, float], ...], ...]
    """The same for the largest decreases."""
    logits: Float[Tensor, "n V"]
    """All of them, minus each latent's mean over the vocabulary, which changes no probability."""

    def _repr_html_(self) -> str:
        def said(pairs: Sequence[tuple[str | int, float]]) -> str:
            return ", ".join(f"{token!r} {value:+.3g}" for token, value in pairs)

        rows = zip(self.features, map(said, self.promoted), map(said, self.suppressed), strict=True)
        return table(rows, ("feature", "promoted", "suppressed"))


def residual_directions(
    model: HookedModel, coder: SparseCoder, features: Sequence[int] | None = None
) -> Float[Tensor, "n d"]:
    """Decoder rows as directions of the residual stream.

    Parameters
    ----------
    features
        Latents; None: all.

    Raises
    ------
    ValueError
        If what the coder predicts is not written to the residual stream by a linear map.
    """
    rows = coder.W_dec.detach() if features is None else coder.W_dec.detach()[list(features)]
    site = streams_of(coder.cfg)[1].partition("@")[0]
    name = SiteName.parse(site)
    if name.local in IN_RESIDUAL:
        return rows
    block = None if name.layer is None else model.block(name.layer)
    for at, branch in {}.items() if block is None else block.branches.items():
        if name.local == f"hook_{at}_out":
            return rows
        scale = 1.0 if block is None else block.out_scales.get(at, 1.0)
        if name.local == f"{at}.{branch.out_site}":
            return rows * scale
        if branch.vectors_site is not None and name.local == f"{at}.{branch.vectors_site}":
            output = branch.value_output()
            return scale * output.push(rows.to(output.W.dtype)).to(rows.dtype)
    raise ValueError(
        f"{site} does not reach the logits by a linear map; sites that do: hook_embed, blocks.{{i}}.hook_resid_pre,"
        " blocks.{i}.mixer.hook_out_proj, blocks.{i}.hook_resid_post, ln_final.hook_out, and what out_proj reads"
    )


@torch.no_grad()
def feature_logits(model: HookedModel, coder: SparseCoder, features: int | Sequence[int], k: int = 10) -> FeatureLogits:
    """What latents add to each token's logit through the final norm's weight and the unembedding: d_f w W_U.

    Parameters
    ----------
    features
        One or several.
    k
        Tokens each way.

    Raises
    ------
    ValueError
        See :func:`residual_directions`.
    """
    chosen = (features,) if isinstance(features, int) else tuple(int(i) for i in features)
    check_features(coder.cfg, chosen)
    if coder.cfg.out_site == "ln_final.hook_out":
        read = coder.W_dec[list(chosen)]
    elif coder.cfg.out_site == "ln_final.hook_normalized":
        read = coder.W_dec[list(chosen)] * model.ln_final.weight.to(coder.W_dec.dtype)
    else:
        read = residual_directions(model, coder, chosen) * model.ln_final.weight.to(coder.W_dec.dtype)
    logits = (read @ model.W_U.to(read.dtype))[:, : model.d_vocab_real]
    logits = logits - logits.mean(1, keepdim=True)
    up, down = (logits.topk(min(k, logits.shape[1]), dim=1, largest=largest) for largest in (True, False))
    return FeatureLogits(chosen, _tokens(model, up), _tokens(model, down), logits)


def _tokens(model: HookedModel, best: Any) -> tuple[tuple[tuple[str | int, float], ...], ...]:
    rows = []
    for ids, values in zip(best.indices, best.values, strict=True):
        names = ids.tolist() if model.tokenizer is None else model._str_tokens(ids, None)
        rows.append(tuple(zip(names, values.tolist(), strict=True)))
    return tuple(rows)


@dataclass(frozen=True)
class Nearest:
    """Latents whose rows point the same way, the nearest first."""

    features: Int[Tensor, "n k"]
    cosines: Float[Tensor, "n k"]


@torch.no_grad()
def nearest_features(
    coder: SparseCoder,
    features: int | Sequence[int],
    k: int = 10,
    *,
    other: SparseCoder | None = None,
    by: Literal["decoder", "encoder"] = "decoder",
) -> Nearest:
    """The latents nearest to some, by the cosine of their decoder rows or encoder columns.

    Parameters
    ----------
    features
        One or several.
    k
        How many for each.
    other
        Another coder to look in; None: the same, a latent itself left out.
    by
        Which weights.

    Raises
    ------
    ValueError
        If the two coders' weights are not of one width.
    """
    if by not in ("decoder", "encoder"):
        raise ValueError(f"by must be 'decoder' or 'encoder', got {by!r}")
    chosen = [features] if isinstance(features, int) else [int(i) for i in features]
    check_features(coder.cfg, tuple(chosen))
    rows, there = (directions(c, by) for c in (coder, coder if other is None else other))
    if rows.shape[1] != there.shape[1]:
        raise ValueError(f"the coders' {by}s are {rows.shape[1]} and {there.shape[1]} wide: they cannot be compared")
    cosines = rows[chosen] @ there.to(rows).t()
    if other is None:
        cosines[torch.arange(len(chosen)), chosen] = -torch.inf
    most = len(there) - (1 if other is None else 0)
    best = cosines.topk(min(k, most), dim=1)
    return Nearest(best.indices, best.values)


def directions(coder: SparseCoder, by: Literal["decoder", "encoder"] = "decoder") -> Float[Tensor, "F d"]:
    """Each latent's decoder row or encoder column, of norm 1; rows of zeros stay zeros."""
    rows = (coder.W_dec if by == "decoder" else coder.W_enc.t()).detach()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
