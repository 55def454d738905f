"""Reconstruction quality: sums over positions in float64, so that batches of any size give the same result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Over n positions of d numbers; y is the model's value and y_hat the coder's."""

    mse: float
    """Mean of (y - y_hat)^2 over all numbers."""
    fvu: float | None
    """sum |y - y_hat|^2 / sum |y - mean y|^2: the fraction of variance unexplained; None where y never changes."""
    ev: float | None
    """1 - fvu."""
    cosine: float
    """Mean cosine of y and y_hat; of zeros it is 0."""
    norm_ratio: float | None
    """Mean |y_hat| by mean |y|: below 1 where the coder shrinks."""

    def to_dict(self) -> dict[str, float | None]:
        """A plain mapping."""
        return asdict(self)


class ReconstructionSums:
    """What :class:`Reconstruction` is made of.

    The sum of squares about the mean is merged batch by batch (Chan, Golub & LeVeque 1979): differences of large sums
    would lose the digits that matter.

    Parameters
    ----------
    d
        Numbers per position.
    """

    def __init__(self, d: int) -> None:
        self.d, self.n = d, 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        """Of y, so far."""
        self.spread = self.error = self.cosine = self.norm = self.norm_hat = 0.0

    @torch.no_grad()
    def add(self, y: Float[Tensor, "n d"], y_hat: Float[Tensor, "n d"]) -> None:
        """Take in some positions.

        Raises
        ------
        FloatingPointError
            If a number is NaN or infinite.
        """
        n = len(y)
        if n == 0:
            return
        y, y_hat = y.detach().double(), y_hat.detach().double()
        mean = y.mean(0)
        spread = float((y - mean).square().sum())
        error = float((y - y_hat).square().sum())
        if not (math.isfinite(error) and math.isfinite(spread)):
            raise FloatingPointError("the activations, or the reconstruction, hold NaN or infinity")
        self._join(n, mean.cpu(), spread)
        norms = y.norm(dim=1), y_hat.norm(dim=1)
        inner = (y * y_hat).sum(1)
        self.error += error
        self.cosine += float(torch.where(inner == 0, 0.0, inner / (norms[0] * norms[1])).sum())
        self.norm += float(norms[0].sum())
        self.norm_hat += float(norms[1].sum())

    def _join(self, n: int, mean: Tensor, spread: float) -> None:
        shift = mean - self.mean
        both = self.n + n
        self.spread += spread + float(shift.square().sum()) * self.n * n / both
        self.mean += shift * (n / both)
        self.n = both

    def tensors(self) -> dict[str, Tensor]:
        """All sums, to be kept and merged."""
        sums = [self.n, self.spread, self.error, self.cosine, self.norm, self.norm_hat]
        return {"sums": torch.tensor(sums, dtype=torch.float64), "mean": self.mean}

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add the positions of other sums, as :meth:`tensors` gave them."""
        n, spread, error, cosine, norm, norm_hat = other["sums"].tolist()
        if n:
            self._join(int(n), other["mean"], spread)
            self.error += error
            self.cosine += cosine
            self.norm += norm
            self.norm_hat += norm_hat

    def result(self) -> Reconstruction:
        """The figures so far.

        Raises
        ------
        ValueError
            If no position was added.
        """
        if self.n == 0:
            raise ValueError("there are no positions to judge the coder on")
        fvu = self.error / self.spread if self.spread > 0 else None
        return Reconstruction(
            mse=self.error / (self.n * self.d),
            fvu=fvu,
            ev=None if fvu is None else 1 - fvu,
            cosine=self.cosine / self.n,
            norm_ratio=self.norm_hat / self.norm if self.norm > 0 else None,
        )
