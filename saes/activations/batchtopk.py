"""BatchTopK: the k n largest pre-activations of a batch of n (Bussmann et al. 2024, arXiv:2412.06410).

An example may have more or fewer than k. After training each example stands alone: latents above one threshold are
active, the running mean of the smallest active value in training.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saes.activations.base import Activation, Latents, affine, runs
from saes.loss_state import LossState
from saes.parameters import CoderParameters
from saes.sparse import Pattern

SAMPLE = 1 << 16
"""Pre-activations from which a first bound is guessed."""

ROOM = (1.5, 4.0)
"""How many times as many entries as wanted the first and second guess aim at."""


def _guess(pre: Float[Tensor, "n F"], share: float) -> float:
    """An estimate of the value that this share of the pre-activations exceeds; at least 0."""
    flat = pre.reshape(-1)
    step = max(1, flat.numel() // SAMPLE)
    sample = flat[:: step + 1 - step % 2]  # an odd step meets all columns where their number is a power of two
    rank = min(len(sample) - 1, int(share * len(sample)))
    return max(0.0, float(sample.sort(descending=True).values[rank]))


class BatchTopK(Activation):
    """cfg.k latents per example on average."""

    def setup(self, coder: CoderParameters) -> None:
        """A scalar threshold, 0 until the first step."""
        super().setup(coder)
        coder.register_buffer("threshold", torch.zeros(()))

    def infer(self, coder: CoderParameters, pre: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """Latents above the stored threshold."""
        return torch.where(pre > coder.threshold, pre, 0.0).relu()

    def train(self, coder: CoderParameters, x: Float[Tensor, "n d"], state: LossState) -> Latents:
        """The largest of the batch, sparse."""
        F, wanted = coder.cfg.d_sae, coder.k * len(x)
        with torch.no_grad():
            rows, indices, pre = self._largest(coder, x, 2 * wanted if state.wide_alpha else wanted)
        pattern = Pattern.of_rows(rows, indices, len(x), F)
        values = self.with_gradient(coder, x, pattern, pre)
        if len(pre) <= wanted:
            return Latents(values, pattern, len(x), least=pre.min() if len(pre) else None)
        is_main = torch.zeros_like(pre, dtype=torch.bool).index_fill_(0, pre.topk(wanted, sorted=False).indices, True)
        main, rest = (
            Latents(values[part], Pattern.of_rows(rows[part], indices[part], len(x), F), len(x))
            for part in (is_main, ~is_main)
        )
        main.least, main.rest = pre[is_main].min(), rest
        return main

    def _largest(self, coder: CoderParameters, x: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, latent and value of the largest positive pre-activations, by rows."""
        share = wanted / (len(x) * coder.cfg.d_sae)
        for room in (*ROOM, None):
            rows, indices, values = self._above(coder, x, None if room is None else room * share)
            if len(values) >= wanted:
                chosen = values.topk(wanted, sorted=False).indices.sort().values
                return rows[chosen], indices[chosen], values[chosen]
        return rows, indices, values

    def _above(self, coder: CoderParameters, x: Tensor, share: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Entries above a guessed bound that leaves about this share of them; without a share all positive ones."""
        found, bound, done = [], 0.0 if share is None else None, 0
        for run in runs(x, coder.cfg.d_sae):
            pre = affine(run, coder.W_enc, self.bias(coder))
            if bound is None:
                assert share is not None
                bound = _guess(pre, share)
            rows, indices = (pre > bound).nonzero(as_tuple=True)
            found.append((rows + done, indices, pre[rows, indices]))
            done += len(run)
        rows, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, indices, values
