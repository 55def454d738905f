"""What decoder directions point at: tokens of the vocabulary, and each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.models import HookedModel
from hooked_mamba.pieces import joined
from saes.coder import SparseCoder
from saes.explorer.data import Ranked
from saes.features import feature_logits, residual_directions

AT_ONCE = 1 << 24
"""Numbers of a product that are formed at a time."""


BLOCK = 2048
"""Features whose directions are looked at together: in a block, sums are rounded alike whoever takes them."""


class Directions(NamedTuple):
    """What the decoder directions of F features point at."""

    promoted: Ranked | None
    """Tokens that each promotes most; None where a direction does not reach the logits."""
    suppressed: Ranked | None
    neighbours: Ranked

    @classmethod
    def of(
        cls, model: HookedModel | None, coder: SparseCoder, features: Int[Tensor, " F"], n_words: int, n_neighbours: int
    ) -> Directions:
        """Of some features; without a model, of each other alone."""
        words = token_rankings(model, coder, n_words, features) if model is not None else None
        promoted, suppressed = words or (None, None)
        return cls(promoted, suppressed, neighbours(coder.W_dec, n_neighbours, features))

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, each with a row for each feature."""
        rankings = {name: ranked for name, ranked in self._asdict().items() if ranked is not None}
        return {f"{name}/{key}": getattr(ranked, key) for name, ranked in rankings.items() for key in KEYS}

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Tensor]]) -> Directions:
        """From :meth:`tensors` of some features after others."""
        found = joined(parts)
        rankings = {
            name: Ranked(*(found[f"{name}/{key}"] for key in KEYS)) if f"{name}/{KEYS[0]}" in found else None
            for name in cls._fields
        }
        return cls(**rankings)  # type: ignore[arg-type]  # neighbours are always there


KEYS = ("values", "indices")
"""Of a :class:`~saes.explorer.data.Ranked`."""


@torch.no_grad()
def token_rankings(
    model: HookedModel, coder: SparseCoder, n: int = 10, features: Int[Tensor, " F"] | None = None
) -> tuple[Ranked, Ranked] | None:
    """The tokens that each feature, or each of some, promotes and suppresses most; see :func:`saes.feature_logits`.

    None if what the coder predicts does not reach the logits through a linear map.
    """
    if not reaches_logits(model, coder):
        return None
    chosen = range(coder.cfg.d_sae) if features is None else features.tolist()
    V = model.d_vocab_real
    step = max(1, AT_ONCE // V)
    up, down = [], []
    for first in range(0, len(chosen), step):
        logits = feature_logits(model, coder, chosen[first : first + step], k=0).logits.float()
        up.append(logits.topk(min(n, V), 1))
        down.append(logits.topk(min(n, V), 1, largest=False))
    return tuple(  # type: ignore[return-value]  # two of them
        Ranked(torch.cat([p.values for p in parts]).cpu(), torch.cat([p.indices for p in parts]).cpu())
        for parts in (up, down)
    )


def reaches_logits(model: HookedModel, coder: SparseCoder) -> bool:
    """Whether a linear map leads from what a coder predicts to the logits, the final norm's divisor held."""
    if coder.cfg.out_site.startswith("ln_final."):
        return coder.cfg.out_site != "ln_final.hook_scale"
    try:
        residual_directions(model, coder, [0])
    except ValueError:
        return False
    return True


@torch.no_grad()
def neighbours(W_dec: Float[Tensor, "all d"], n: int = 10, features: Int[Tensor, " F"] | None = None) -> Ranked:
    """The features of nearest decoder direction, by cosine, to each feature, or to each of some.

    A feature is not its own neighbour.
    """
    everyone = torch.arange(len(W_dec), device=W_dec.device)
    features = everyone if features is None else features.to(W_dec.device)
    n = min(n, len(W_dec) - 1)
    unit = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    values, indices = [], []
    for part in features.split(max(1, AT_ONCE // len(W_dec))):
        cosines = unit[part] @ unit.t()
        cosines[torch.arange(len(part), device=part.device), part] = -torch.inf
        best = cosines.topk(n, 1)
        values.append(best.values)
        indices.append(best.indices)
    return Ranked(torch.cat(values).clamp(-1, 1).cpu(), torch.cat(indices).cpu())
