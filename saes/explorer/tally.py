"""One pass over latents that collects what a page shows about each feature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saes.explorer.best import Best, best_of_groups
from saes.explorer.data import Contexts
from saes.explorer.histogram import Histograms

OUTSIDE = -1
"""In place of a token where a context reaches beyond its row, or into padding."""


class Tally:
    """Counts, histograms, the strongest contexts and a uniform sample of all activations, of F features.

    Parameters
    ----------
    F
        Features.
    top, sampled
        Contexts kept for each: those where it is strongest, at most one per row; and a uniform sample of all positions
        where it is active.
    before, after
        Tokens shown around the position.
    bins
        Of the histogram.
    seed
        Of the sample.
    """

    def __init__(
        self,
        F: int,
        *,
        top: int = 20,
        sampled: int = 12,
        before: int = 24,
        after: int = 7,
        bins: int = 64,
        seed: int = 0,
    ) -> None:
        for name, value in (("top", top), ("sampled", sampled), ("before", before), ("after", after)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        self.F, self.before, self.after = F, before, after
        window = before + 1 + after
        fields = {
            "value": ((), torch.float32, 0),
            "row": ((), torch.long, OUTSIDE),
            "position": ((), torch.long, OUTSIDE),
            "tokens": ((window,), torch.int32, OUTSIDE),
            "activations": ((window,), torch.float32, 0),
        }
        self.top, self.sampled = Best(F, top, dict(fields)), Best(F, sampled, dict(fields))
        self.histograms = Histograms(F, bins)
        self.generator = torch.Generator().manual_seed(seed)
        self.n_rows = self.n_tokens = 0
        self.counts = torch.zeros(F, dtype=torch.long)
        self.sums = torch.zeros(F, dtype=torch.float64)
        self.largest = torch.zeros(F)

    def add(
        self,
        z: Float[Tensor, "b l F"],
        tokens: Int[Tensor, "b l"],
        counted: Bool[Tensor, "b l"],
        real: Bool[Tensor, "b l"],
    ) -> None:
        """Add the latents of some rows.

        Parameters
        ----------
        z
            0 or more; 0 is inactive.
        tokens
            Of the rows.
        counted
            Positions that count; activity elsewhere is ignored.
        real
            False at padding, which is not shown either.
        """
        b, l, F = z.shape
        z = z * counted.to(z.device)[..., None]
        place, feature = z.flatten(0, 1).gt(0).nonzero(as_tuple=True)
        value = z.flatten(0, 1)[place, feature].float().cpu()
        place, feature = place.cpu(), feature.cpu()

        self.counts += torch.bincount(feature, minlength=F)
        self.sums.index_add_(0, feature, value.double())
        self.largest.scatter_reduce_(0, feature, value, "amax")
        self.histograms.add(feature, value)

        shown = torch.where(real.cpu(), tokens.cpu(), OUTSIDE)
        strongest, _ = best_of_groups((place // l) * F + feature, value, 1)  # one per row and feature
        self._offer(self.top, strongest, value.double(), place, feature, value, z, shown)
        keys = torch.rand(len(value), dtype=torch.float64, generator=self.generator)
        self._offer(self.sampled, torch.arange(len(value)), keys, place, feature, value, z, shown)
        self.n_rows += b
        self.n_tokens += int(counted.sum())

    def tensors(self) -> dict[str, Tensor]:
        """All that was collected, to be kept and merged."""
        kept = {
            "n": torch.tensor([self.n_rows, self.n_tokens]),
            "counts": self.counts,
            "sums": self.sums,
            "largest": self.largest,
            "histogram": self.histograms.counts,
            "exponents": self.histograms.exponents,
        }
        for name, best in (("top", self.top), ("sampled", self.sampled)):
            kept |= {f"{name}/{key}": value for key, value in {"keys": best.keys, **best.fields}.items()}
        return kept

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add the rows of another tally, as :meth:`tensors` gave them, behind one's own."""
        for name, best in (("top", self.top), ("sampled", self.sampled)):
            fields = {key: other[f"{name}/{key}"] for key in best.fields}
            fields["row"] = torch.where(fields["row"] == OUTSIDE, OUTSIDE, fields["row"] + self.n_rows)
            best.merge(other[f"{name}/keys"], fields)
        self.histograms.merge(other["histogram"], other["exponents"])
        self.counts += other["counts"]
        self.sums += other["sums"]
        self.largest = torch.maximum(self.largest, other["largest"])
        n_rows, n_tokens = other["n"].tolist()
        self.n_rows += n_rows
        self.n_tokens += n_tokens

    def _offer(
        self,
        best: Best,
        chosen: Tensor,
        keys: Tensor,
        place: Tensor,
        feature: Tensor,
        value: Tensor,
        z: Tensor,
        tokens: Tensor,
    ) -> None:
        chosen = chosen[best.hopeful(feature[chosen], keys[chosen])]
        row, position = place[chosen] // tokens.shape[1], place[chosen] % tokens.shape[1]
        window = position[:, None] + torch.arange(-self.before, self.after + 1)
        inside = (window >= 0) & (window < tokens.shape[1])
        window = window.clamp(0, tokens.shape[1] - 1)
        there = z.device
        activations = z[row[:, None].to(there), window.to(there), feature[chosen][:, None].to(there)].float().cpu()
        values = {
            "value": value[chosen],
            "row": row + self.n_rows,
            "position": position,
            "tokens": torch.where(inside, tokens[row[:, None], window], OUTSIDE),
            "activations": activations * inside,
        }
        best.add(feature[chosen], keys[chosen], values)

    def contexts(self, best: Best) -> Contexts:
        """What `self.top` or `self.sampled` holds, the largest value first."""
        order = best.fields["value"].argsort(dim=1, descending=True, stable=True)
        held = {
            name: value.gather(1, order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand_as(value))
            for name, value in best.fields.items()
        }
        return Contexts(
            values=held["value"],
            rows=held["row"],
            positions=held["position"],
            tokens=held["tokens"],
            activations=held["activations"],
            before=self.before,
        )
