"""Histograms of values whose range is not known beforehand."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Histograms:
    """One histogram for each of F features, exact in one pass over positive values.

    The bins of a feature part [0, 2^e) evenly. Where a value lies beyond, pairs of bins are merged, which doubles the
    range; edges are whole multiples of a power of two, so that no value changes its side.

    Parameters
    ----------
    F
        Features.
    bins
        Of each; a power of two.
    """

    def __init__(self, F: int, bins: int = 64) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of two, 2 or more; got {bins}")
        self.bins = bins
        self.counts = torch.zeros(F, bins, dtype=torch.long)
        self.exponents = torch.zeros(F, dtype=torch.int32)
        self._seen = torch.zeros(F, dtype=torch.bool)

    def add(self, features: Int[Tensor, " m"], values: Float[Tensor, " m"]) -> None:
        """Count each value under its feature."""
        if len(features) == 0:
            return
        largest = torch.zeros(len(self.counts), dtype=torch.float64)
        largest.scatter_reduce_(0, features, values.double(), "amax")
        present = largest > 0
        needed = torch.frexp(largest).exponent
        fresh = present & ~self._seen
        self.exponents[fresh] = needed[fresh]
        self._seen |= present
        self._widen(torch.where(present, (needed - self.exponents).clamp(min=0), 0))
        places = torch.ldexp(values.double(), -self.exponents[features]).mul(self.bins).long()
        flat = features * self.bins + places
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def merge(self, counts: Int[Tensor, "F bins"], exponents: Int[Tensor, " F"]) -> None:
        """Add the values of other histograms with as many bins."""
        other = Histograms(len(counts), self.bins)
        other.counts, other.exponents, other._seen = counts.clone(), exponents.clone(), counts.sum(1) > 0
        fresh = other._seen & ~self._seen
        self.exponents[fresh] = other.exponents[fresh]
        for mine, theirs in ((self, other), (other, self)):
            mine._widen(torch.where(other._seen, (theirs.exponents - mine.exponents).clamp(min=0), 0))
        self.counts += other.counts
        self._seen |= other._seen

    def _widen(self, doublings: Int[Tensor, " F"]) -> None:
        self.exponents += doublings
        doublings = doublings.clamp(max=self.bins.bit_length())  # by then everything is in the first bin
        while bool((rows := doublings > 0).any()):
            merged = self.counts[rows].unflatten(1, (-1, 2)).sum(2)
            self.counts[rows] = torch.cat([merged, torch.zeros_like(merged)], 1)
            doublings = doublings - rows.to(doublings.dtype)

    @property
    def widths(self) -> Float[Tensor, " F"]:
        """Width of each feature's bins."""
        return torch.ldexp(torch.ones(len(self.counts), dtype=torch.float64), self.exponents) / self.bins
