"""TopK: the k largest pre-activations of each example, rectified (Gao et al. 2024, arXiv:2406.04093)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saes.activations.base import Activation, Latents, affine, runs
from saes.loss_state import LossState
from saes.parameters import CoderParameters
from saes.sparse import Pattern

GROUP = 8
"""Columns per group; first only each group's maximum is compared."""

PAYS = 64
"""Columns per k, and groups at least, from which looking at groups first is faster."""


def topk(pre: Float[Tensor, "n F"], k: int, ordered: bool = False) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Each row's k largest values and their columns; `ordered`: largest first.

    The k largest lie in the k groups of columns with the largest maxima, so most columns are looked at only once.
    """
    n, F = pre.shape
    if F % GROUP or PAYS * max(k, PAYS) // 4 > F:
        return torch.topk(pre, k, sorted=ordered)
    width = F // GROUP  # a group is every width-th column: its maxima are found along whole rows
    groups = pre.view(n, GROUP, width).amax(1).topk(k, sorted=False).indices
    members = torch.arange(0, F, width, device=pre.device)
    candidates = (groups.unsqueeze(2) + members).flatten(1)
    values, at = pre.gather(1, candidates).topk(k, sorted=ordered)
    return values, candidates.gather(1, at)


class TopK(Activation):
    """cfg.k latents per example, fewer where fewer are positive."""

    def choose(
        self, pre: Float[Tensor, "n F"], k: int, ordered: bool = False
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """The pre-activations that are kept and their columns; `ordered`: largest first."""
        return topk(pre, k, ordered)

    def value(self, pre: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Latents of the pre-activations that are kept."""
        return pre.relu()

    def infer(self, coder: CoderParameters, pre: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """Dense latents."""
        values, indices = self.choose(pre, coder.k)
        return torch.zeros_like(pre).scatter(1, indices, self.value(values))

    def select(
        self, coder: CoderParameters, x: Float[Tensor, "n d"], k: int, ordered: bool = False
    ) -> tuple[Pattern, Tensor]:
        """The entries of the k largest, and their pre-activations with gradients."""
        with torch.no_grad():
            pre = (affine(run, coder.W_enc, self.bias(coder)) for run in runs(x, coder.cfg.d_sae))
            found = [self.choose(run, k, ordered) for run in pre]
            values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        pattern = Pattern.of_codes(indices, coder.cfg.d_sae)
        return pattern, self.with_gradient(coder, x, pattern, values.flatten())

    def train(self, coder: CoderParameters, x: Float[Tensor, "n d"], state: LossState) -> Latents:
        """As in inference, sparse."""
        k, F = coder.k, coder.cfg.d_sae
        if not state.wide_alpha:
            pattern, pre = self.select(coder, x, k)
            return Latents(pre.relu(), pattern, len(x))
        pattern, pre = self.select(coder, x, min(2 * k, F), ordered=True)
        values, indices = (t.reshape(len(x), -1) for t in (pre.relu(), pattern.indices))
        main, rest = (
            Latents(values[:, part].flatten(), Pattern.of_codes(indices[:, part], F), len(x))
            for part in (slice(None, k), slice(k, None))
        )
        main.rest = rest
        return main
