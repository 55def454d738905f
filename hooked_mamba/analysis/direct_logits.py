"""Direct logit attribution: what each part adds to a logit through the unembedding alone.

The final norm's scale is frozen. Parts sum to the logit (or to the difference of two logits) at every position, whether
norms are folded or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.decomposition import as_norm_reads
from hooked_mamba.display import table
from hooked_mamba.frozen.tokens import Source
from hooked_mamba.hooks.positions import PosSlice

Token = str | int | Int[Tensor, "..."]


@dataclass(frozen=True)
class DirectLogits:
    """Attributions and the names of their parts."""

    values: Float[Tensor, "part ..."]
    labels: list[str]

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The parts that matter most on average, signed, largest first."""
        mean = self.values.reshape(len(self.labels), -1).mean(1)
        order = mean.abs().argsort(descending=True)[:k]
        return [(self.labels[i], float(mean[i])) for i in order.tolist()]

    def _repr_html_(self) -> str:
        rows = [(label, f"{value:+.4f}") for label, value in self.top()]
        return table(rows, ("part", "mean logit"))


@torch.no_grad()
def direct_logit_attribution(
    cache: ActivationCache,
    tokens: Token,
    incorrect_tokens: Token | None = None,
    by: Literal["layer", "channel", "head"] = "layer",
    pos_slice: PosSlice = -1,
) -> DirectLogits:
    """A logit, or a difference of two, as a sum over the parts of the model.

    Parameters
    ----------
    tokens, incorrect_tokens
        One token (text or id) or one per row.
    by
        "layer": embedding and mixers. "channel", "head" (where mixers have heads): those of all mixers, the embedding
        and the biases.
    pos_slice
        Positions; an int drops the axis.
    """
    if by not in ("layer", "channel", "head"):
        raise ValueError(f"by must be 'layer', 'channel' or 'head', got {by!r}")
    if by == "layer":
        stack, labels = cache.decompose_resid(pos_slice=pos_slice, return_labels=True)
        values = cache.logit_attrs(stack, tokens, incorrect_tokens, pos_slice=pos_slice)
        return _with_bias(cache, DirectLogits(values, labels), tokens, incorrect_tokens)
    if by == "head":
        cache.head_width()  # says so where there are none
    directions = _directions(cache, tokens, incorrect_tokens)
    # Projecting first: one number a part instead of d. Rows may have their own direction.
    distinct, row = directions.reshape(-1, directions.shape[-1]).unique(dim=0, return_inverse=True)
    values, labels = cache.get_full_resid_decomposition(
        expand_channels=by == "channel",
        apply_ln=True,
        pos_slice=pos_slice,
        return_labels=True,
        project_output_onto=distinct.t(),
    )
    if directions.ndim == 1:
        return _with_bias(cache, DirectLogits(values[..., 0], labels), tokens, incorrect_tokens)
    if not cache.has_batch_dim:
        raise ValueError("this cache has no batch axis: give one token, not one per row")
    picked = torch.stack([values[:, i, ..., int(k)] for i, k in enumerate(row)], 1)
    return _with_bias(cache, DirectLogits(picked, labels), tokens, incorrect_tokens)


def _with_bias(cache: ActivationCache, found: DirectLogits, tokens: Token, incorrect: Token | None) -> DirectLogits:
    """With the final norm's own bias as a part "ln_final_bias", where it has one."""
    bias = getattr(cache.model.ln_final, "bias", None)
    if bias is None:
        return found
    directions = _directions(cache, tokens, incorrect)
    part = (directions @ bias.to(directions.dtype)).to(found.values.dtype)
    part = part.reshape(*part.shape, *(1,) * (found.values.ndim - 1 - part.ndim)).expand_as(found.values[0])
    return DirectLogits(torch.cat([found.values, part[None]]), [*found.labels, "ln_final_bias"])


@torch.no_grad()
def source_logit_attribution(
    cache: ActivationCache,
    tokens: Token,
    incorrect_tokens: Token | None = None,
    source: Source = "token",
    target: int = -1,
) -> Float[Tensor, "layer source *batch"]:
    """What each mixer adds to a logit at `target`, by the position that it came from.

    Parameters
    ----------
    tokens, incorrect_tokens
        One token (text or id) or one per row.
    source
        "token" or "scan", see `stack_source_results`.

    Returns
    -------
    Tensor
        One column per source position, and a last one for the biases; each row sums to the mixer's attribution.
    """
    model: Any = cache.model
    directions = _directions(cache, tokens, incorrect_tokens)
    norm = model.ln_final
    distinct, row = directions.reshape(-1, directions.shape[-1]).unique(dim=0, return_inverse=True)
    onto = as_norm_reads(norm, distinct * norm.weight.to(distinct.dtype)).t()  # centring is its own transpose
    scale = cache.at(cache["scale"], target)
    rows = []
    for i in range(model.cfg.n_layers):
        parts = cast(Tensor, cache.stack_source_results(i, source, pos_slice=target, project_output_onto=onto)) / scale
        if directions.ndim == 1:
            rows.append(parts[..., 0])
        else:
            rows.append(torch.stack([parts[:, j, int(k)] for j, k in enumerate(row)], 1))
    return torch.stack(rows)


def _directions(cache: ActivationCache, tokens: Token, incorrect_tokens: Token | None) -> Tensor:
    def of(token: Token) -> Tensor:
        if isinstance(token, Tensor) and token.ndim > 1:
            raise ValueError(f"give one token or one per row, got {list(token.shape)}; for others use logit_attrs")
        return cache.logit_directions(token)

    found = of(tokens)
    if incorrect_tokens is None:
        return found
    other = of(incorrect_tokens)
    if other.shape != found.shape:
        raise ValueError("tokens and incorrect_tokens differ in shape")
    return found - other
