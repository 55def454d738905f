"""How many latents are active, how often each is, and which never are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saes.sparse import Codes

EDGES = tuple(-7 + 0.5 * i for i in range(15))
"""Edges of the density histogram: log10 of the share of positions, from -7 to 0."""

DENSE = 0.1
"""Share of positions from which a latent is called dense."""


@dataclass(frozen=True)
class Sparsity:
    """Over n positions."""

    l0: float
    """Active latents a position."""
    dead_share: float
    """Share of latents that are active nowhere."""
    dense_share: float
    """Share of latents active at a tenth of the positions or more."""
    edges: tuple[float, ...]
    """log10 of density, between the bins."""
    histogram: tuple[int, ...]
    """Latents by density, dead ones left out. A density on an edge counts above it; the outer bins take the rest."""

    def to_dict(self) -> dict[str, float | list]:
        """A plain mapping."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


class SparsitySums:
    """How often each latent was active, and how strong.

    Parameters
    ----------
    F
        Latents.
    """

    def __init__(self, F: int) -> None:
        self.n = 0
        self.count = torch.zeros(F, dtype=torch.long)
        """Positions at which each latent was active."""
        self.total = torch.zeros(F, dtype=torch.float64)
        """Sum of each latent."""
        self.largest = torch.zeros(F, dtype=torch.float64)

    def add(self, codes: Codes) -> None:
        """Take in the active latents of some positions, n k."""
        values, indices = (part.detach().reshape(-1).cpu() for part in codes)
        self.n += codes.values.shape[:-1].numel()
        values, indices = values[values != 0].double(), indices[values != 0]
        self.count += indices.bincount(minlength=len(self.count))
        self.total.index_add_(0, indices, values)
        self.largest.scatter_reduce_(0, indices, values, "amax")

    def tensors(self) -> dict[str, Tensor]:
        """All sums, to be kept and merged."""
        return {"n": torch.tensor(self.n), "count": self.count, "total": self.total, "largest": self.largest}

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add the positions of other sums, as :meth:`tensors` gave them."""
        self.n += int(other["n"])
        self.count += other["count"]
        self.total += other["total"]
        self.largest = torch.maximum(self.largest, other["largest"])

    @property
    def density(self) -> Float[Tensor, " F"]:
        """Share of positions at which each latent is active."""
        return self.count.double() / max(self.n, 1)

    def result(self) -> Sparsity:
        """The figures so far.

        Raises
        ------
        ValueError
            If no position was added.
        """
        if self.n == 0:
            raise ValueError("there are no positions to judge the coder on")
        density = self.density
        alive = density[density > 0].log10()
        inner = torch.tensor(EDGES[1:-1], dtype=torch.float64)
        bins = torch.bucketize(alive, inner, right=True).bincount(minlength=len(EDGES) - 1)
        return Sparsity(
            l0=float(self.count.sum()) / self.n,
            dead_share=float((self.count == 0).double().mean()),
            dense_share=float((density >= DENSE).double().mean()),
            edges=EDGES,
            histogram=tuple(bins.tolist()),
        )
