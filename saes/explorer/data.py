"""Data about the features of one dictionary: statistics, contexts, promoted tokens, neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.config import CoderConfig


@dataclass(frozen=True)
class Contexts:
    """Pieces of text for each of F features, n each, the largest activation first."""

    values: Float[Tensor, "F n"]
    """Activation at the position the piece is about; 0: there is no piece."""
    rows: Int[Tensor, "F n"]
    """Row of the text; -1: there is no piece."""
    positions: Int[Tensor, "F n"]
    """Position in it."""
    tokens: Int[Tensor, "F n w"]
    """Token ids around the position; -1 beyond the row and in padding."""
    activations: Float[Tensor, "F n w"]
    """The feature's activation at each of them."""
    before: int
    """Where the position is in the piece."""


@dataclass(frozen=True)
class Ranked:
    """The first few of a ranking, for each of F features."""

    values: Float[Tensor, "F m"]
    indices: Int[Tensor, "F m"]


@dataclass(frozen=True)
class FeatureData:
    """All or some features of a dictionary, as measured on one text."""

    name: str
    """Of the dictionary."""
    cfg: CoderConfig
    features: Int[Tensor, " F"]
    """Their numbers in the dictionary. Row i of everything below is about feature `features[i]`."""
    n_tokens: int
    """Positions that were counted."""
    counts: Int[Tensor, " F"]
    """Positions at which a feature was active."""
    largest: Float[Tensor, " F"]
    """Its largest activation."""
    means: Float[Tensor, " F"]
    """Its mean activation where it was active; 0 if it never was."""
    histogram: Int[Tensor, "F bins"]
    """Activations above 0 by size."""
    bin_widths: Float[Tensor, " F"]
    """Bin i of a feature holds activations from i to i + 1 widths."""
    top: Contexts
    """Where it is strongest, at most one piece a row."""
    sampled: Contexts
    """A uniform sample of the positions where it is active."""
    promoted: Ranked | None
    """Tokens whose logits its decoder raises most, by the final norm's weight and the unembedding, the mean over the
    vocabulary taken out; per unit of activation and of the final norm's divisor. None where the dictionary does not
    write into the residual stream."""
    suppressed: Ranked | None
    """And those it lowers most."""
    neighbours: Ranked
    """Features whose decoder directions are nearest, by cosine."""
    vocabulary: Mapping[int, str]
    """The text of every token id that occurs above."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Names that someone gave to features."""

    @property
    def density(self) -> Float[Tensor, " F"]:
        """Share of positions at which each feature was active."""
        return self.counts.double() / max(self.n_tokens, 1)

    def only(self, features: Sequence[int]) -> FeatureData:
        """The same about some of the features, in the order asked for."""
        row_of = {feature: row for row, feature in enumerate(self.features.tolist())}
        for feature in features:
            if feature not in row_of:
                held = f"0 to {len(row_of) - 1}" if len(row_of) == self.cfg.d_sae else f"{len(row_of)} others"
                raise IndexError(f"feature {feature} of {self.name} is not here: there are {held}")
        rows = torch.tensor([row_of[feature] for feature in features], dtype=torch.long)
        return _rows(self, rows)


def _rows(held: Any, rows: Tensor) -> Any:
    """A dataclass of tensors, and of such dataclasses, with some of its rows."""
    chosen = {}
    for part in dataclasses.fields(held):
        value = getattr(held, part.name)
        if isinstance(value, Tensor):
            chosen[part.name] = value[rows]
        elif isinstance(value, Contexts | Ranked):
            chosen[part.name] = _rows(value, rows)
    return dataclasses.replace(held, **chosen)
