"""The differences between two dictionaries, and between two models seen through one dictionary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.display import table
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.features import directions
from saes.metrics.assignment import best_pairs
from saes.metrics.reconstruction import ReconstructionSums
from saes.naming import check_fits
from saes.reading import encode_on
from saes.rewriting import Rewrite, rewritten

HUNGARIAN = 2048
"""Latents up to which the best one-to-one pairing is looked for; it takes cubic time."""

ROWS = 1 << 12
"""Latents whose cosines are held at a time."""


@dataclass(frozen=True)
class DictionaryDiff:
    """How the latents of coder a match those of coder b."""

    pairs: Int[Tensor, "p 2"]
    """Latent of a and of b, one to one, in the order of their cosines."""
    cosines: Float[Tensor, " p"]
    nearest_in_b: Int[Tensor, " A"]
    """Of each latent of a, whichever other latents it is nearest to as well."""
    cosine_in_b: Float[Tensor, " A"]
    nearest_in_a: Int[Tensor, " B"]
    cosine_in_a: Float[Tensor, " B"]
    pairing: str
    by: str

    @property
    def mean_max_cosine(self) -> float:
        """Mean over a's latents of the largest cosine in b (MMCS, Sharkey et al. 2022)."""
        return float(self.cosine_in_b.mean())

    def shared(self, least: float = 0.7) -> float:
        """Share of a's latents with a partner of this cosine or more."""
        return float((self.cosines >= least).sum()) / len(self.nearest_in_b)

    def only_in_a(self, below: float = 0.5) -> list[int]:
        """Latents of a without a close match in b, the least similar first."""
        return _below(self.cosine_in_b, below)

    def only_in_b(self, below: float = 0.5) -> list[int]:
        """Latents of b without a close match in a, the least similar first."""
        return _below(self.cosine_in_a, below)

    def _repr_html_(self) -> str:
        rows = [
            ("latents", f"{len(self.nearest_in_b)} and {len(self.nearest_in_a)}"),
            ("mean largest cosine, a in b", f"{self.mean_max_cosine:.4f}"),
            ("mean largest cosine, b in a", f"{float(self.cosine_in_a.mean()):.4f}"),
            ("pairs", f"{len(self.pairs)} ({self.pairing}, {self.by})"),
            *((f"of cosine {least} or more", f"{self.shared(least):.2%} of a") for least in (0.9, 0.7, 0.5)),
        ]
        return table(rows, caption="Two dictionaries")


def _below(cosines: Tensor, bound: float) -> list[int]:
    order = cosines.argsort()
    return order[cosines[order] < bound].tolist()


@torch.no_grad()
def compare_dictionaries(
    a: SparseCoder,
    b: SparseCoder,
    *,
    by: Literal["decoder", "encoder"] = "decoder",
    pairing: Literal["auto", "hungarian", "mutual"] = "auto",
) -> DictionaryDiff:
    """Match the latents of two coders by the cosines of their decoder rows or encoder columns.

    Parameters
    ----------
    pairing
        "hungarian": the one-to-one pairing with the largest sum of cosines. "mutual": latents that are each other's
        nearest, which may be fewer. "auto": the first for up to 2,048 latents.

    Raises
    ------
    ValueError
        If their weights are not of one width.
    """
    if pairing not in ("auto", "hungarian", "mutual"):
        raise ValueError(f"pairing must be 'auto', 'hungarian' or 'mutual', got {pairing!r}")
    rows, columns = directions(a, by), directions(b, by)
    if rows.shape[1] != columns.shape[1]:
        raise ValueError(f"the {by}s are {rows.shape[1]} and {columns.shape[1]} wide: they cannot be compared")
    if pairing == "auto":
        pairing = "hungarian" if max(len(rows), len(columns)) <= HUNGARIAN else "mutual"
    in_b, in_a = _nearest(rows, columns), _nearest(columns, rows)
    if pairing == "hungarian":
        similar = rows.double() @ columns.to(rows).double().t()
        left, right = map(torch.from_numpy, best_pairs(similar.cpu().numpy()))
        cosines = similar.cpu()[left, right]
    else:
        left = torch.arange(len(rows))
        left = left[in_a[0].cpu()[in_b[0].cpu()] == left]
        right = in_b[0].cpu()[left]
        cosines = in_b[1].cpu()[left].double()
    order = cosines.argsort(descending=True, stable=True)
    pairs = torch.stack([left, right], 1)[order]
    return DictionaryDiff(pairs, cosines[order], in_b[0], in_b[1], in_a[0], in_a[1], pairing, by)


def _nearest(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the column with the largest cosine, and that cosine."""
    best = [(part @ columns.to(rows).t()).max(1) for part in rows.split(ROWS)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


@dataclass(frozen=True)
class ModelDiff:
    """The latents of one dictionary in two models on the same tokens."""

    frequency: Float[Tensor, "2 F"]
    """Share of tokens on which each latent is active, in a and in b."""
    mean: Float[Tensor, "2 F"]
    """Mean of each latent over all tokens."""
    correlation: Float[Tensor, " F"]
    """Of each latent in a and in b over the tokens; 0 where it never changes in one of them."""
    fvu: tuple[float | None, float | None]
    """Share of the variance that the dictionary leaves unexplained in a and in b."""
    tokens: int

    def changed(self, k: int = 10) -> list[tuple[int, float]]:
        """The latents whose mean differs most between the models, and mean in b minus mean in a."""
        difference = self.mean[1] - self.mean[0]
        best = difference.abs().topk(min(k, len(difference))).indices.tolist()
        return [(i, float(difference[i])) for i in best]

    def _repr_html_(self) -> str:
        def row(i: int) -> tuple[Any, ...]:
            return (i, *(f"{float(v):.4g}" for v in (*self.mean[:, i], *self.frequency[:, i], self.correlation[i])))

        head = ("feature", "mean in a", "mean in b", "frequency in a", "frequency in b", "correlation")
        return table([row(i) for i, _ in self.changed()], head, caption=f"Two models, {self.tokens} tokens")


@torch.no_grad()
def compare_models(
    a: HookedModel, b: HookedModel, coder: SparseCoder, tokens: Tensor | Iterable[Tensor], *, mask: Tensor | None = None
) -> ModelDiff:
    """Read two models with one dictionary: a model before and after training, quantisation, an edit.

    Parameters
    ----------
    coder
        A dictionary whose site both models have.
    tokens
        b l, or batches of that.
    mask
        1 for real tokens; for a single tensor of tokens.

    Raises
    ------
    ValueError
        If the coder fits one of the models only, or there are no tokens.
    """
    for model, name in ((a, "the coder in a"), (b, "the coder in b")):
        check_fits(coder, model, name)
    if mask is not None and not isinstance(tokens, Tensor):
        raise ValueError("mask= goes with one tensor of tokens")
    F = coder.cfg.d_sae
    n = 0
    total, squares, active = (torch.zeros(2, F, dtype=torch.float64) for _ in range(3))
    products = torch.zeros(F, dtype=torch.float64)
    errors = [ReconstructionSums(coder.cfg.d_out) for _ in range(2)]
    for batch in [tokens] if isinstance(tokens, Tensor) else tokens:
        seen = []
        for i, model in enumerate((a, b)):
            read = encode_on(model, coder, batch, attention_mask=mask)
            z = read.dense()[read.real].double().cpu()
            seen.append(z)
            total[i] += z.sum(0)
            squares[i] += z.square().sum(0)
            active[i] += (z != 0).sum(0)
            _add_errors(model, coder, batch, read.real, errors[i])
        products += (seen[0] * seen[1]).sum(0)
        n += len(seen[0])
    if n == 0:
        raise ValueError("there are no tokens to compare the models on")
    mean = total / n
    variance = squares / n - mean.square()
    spread = (variance[0] * variance[1]).clamp(min=0).sqrt()
    floor = 1e-12 * (squares[0] * squares[1]).sqrt() / n
    correlation = torch.where(spread > floor, (products / n - mean[0] * mean[1]) / spread.clamp(min=1e-300), 0.0)
    fvu = [e.result().fvu for e in errors]
    return ModelDiff(active / n, mean, correlation.clamp(-1, 1), (fvu[0], fvu[1]), n)


def _add_errors(model: HookedModel, coder: SparseCoder, tokens: Tensor, real: Tensor, sums: ReconstructionSums) -> None:
    def look(x: Tensor, y: Tensor) -> None:
        sums.add(y[real], coder(x[real]))

    with rewritten(model, [Rewrite(coder.cfg, look)]):
        model(tokens, return_type=None, attention_mask=None if bool(real.all()) else real.long())


def compare(a: Any, b: Any, coder: SparseCoder | None = None, tokens: Any = None, **options: Any) -> Any:
    """Two coders (:func:`compare_dictionaries`), or two models through one coder (:func:`compare_models`).

    Raises
    ------
    TypeError
        If they are neither, or models without coder and tokens.
    """
    if isinstance(a, SparseCoder) and isinstance(b, SparseCoder):
        if coder is not None or tokens is not None:
            raise TypeError("two dictionaries are compared by their weights: coder= and tokens= are for models")
        return compare_dictionaries(a, b, **options)
    if isinstance(a, HookedModel) and isinstance(b, HookedModel):
        if coder is None or tokens is None:
            raise TypeError("two models are compared through a dictionary: pass coder= and tokens=")
        return compare_models(a, b, coder, tokens, **options)
    raise TypeError(f"expected two coders or two models, got {type(a).__name__} and {type(b).__name__}")
