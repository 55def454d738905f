"""How much of a planted dictionary a coder has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saes.metrics.assignment import best_pairs


@dataclass(frozen=True)
class Recovery:
    """Values from 0 to 1. Chance is not 0: compare with the coder before training."""

    mmcs: float
    """Mean over atoms of the largest cosine with any decoder row (Sharkey et al. 2022)."""
    mcc: float
    """Mean cosine of atoms and rows paired one to one (Hungarian), an atom without partner counting 0."""
    recovered: float
    """Share of atoms whose partner has a cosine of 0.9 or more."""
    f1: float | None = None
    """Mean F1 of paired latents as detectors of their atoms; None if no activations were given."""

    def to_dict(self) -> dict[str, float | None]:
        """A plain mapping."""
        return asdict(self)


def cosines(atoms: Float[Tensor, "A d"], W_dec: Float[Tensor, "F d"]) -> Float[Tensor, "A F"]:
    """Cosines between atoms and decoder rows; rows of zeros have cosine 0."""
    atoms, rows = (t.detach().double() for t in (atoms, W_dec))
    return (atoms / atoms.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).t()


def recovery(
    atoms: Float[Tensor, "A d"],
    W_dec: Float[Tensor, "F d"],
    *,
    amounts: Float[Tensor, "n A"] | None = None,
    z: Float[Tensor, "n F"] | None = None,
) -> Recovery:
    """Compare decoder rows with the planted atoms.

    Parameters
    ----------
    amounts, z
        How much of each atom is in n examples, and the coder's latents of the same examples, for F1.
    """
    similar = cosines(atoms, W_dec)
    rows, columns = map(torch.from_numpy, best_pairs(similar.cpu().numpy()))
    paired = similar[rows, columns]
    f1 = None
    if amounts is not None and z is not None:
        there, said = (amounts[:, rows] != 0).double(), (z[:, columns] != 0).double()
        hits = (there * said).sum(0)
        either = there.sum(0) + said.sum(0)
        f1 = float(torch.where(either > 0, 2 * hits / either.clamp(min=1), 0.0).sum() / len(atoms))
    return Recovery(
        mmcs=float(similar.max(1).values.mean()),
        mcc=float(paired.sum() / len(atoms)),
        recovered=float((paired >= 0.9).sum() / len(atoms)),
        f1=f1,
    )
