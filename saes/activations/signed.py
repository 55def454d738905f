"""Two ways of choosing latents that other libraries' files have; coders with them are read, not trained.

abstopk     the k pre-activations of the largest magnitude, signs kept (arXiv:2510.00404; SAELens)
groupmax    the largest of each of k runs of F / k latents, rectified (sparsify)
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from saes.activations.base import Latents
from saes.activations.topk import TopK, topk
from saes.loss_state import LossState
from saes.parameters import CoderParameters


class OnlyRead(TopK):
    """A choice of k latents that no training here makes."""

    def train(self, coder: CoderParameters, x: Float[Tensor, "n d"], state: LossState) -> Latents:
        """Refuse.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(f"{coder.cfg.architecture} coders are read from files and not trained here; train 'topk'")


class AbsTopK(OnlyRead):
    """Latents of either sign."""

    def choose(
        self, pre: Float[Tensor, "n F"], k: int, ordered: bool = False
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Each row's k largest magnitudes: their values and columns."""
        indices = topk(pre.abs(), k, ordered)[1]
        return pre.gather(1, indices), indices

    def value(self, pre: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The pre-activations themselves."""
        return pre


class GroupMax(OnlyRead):
    """One latent of each group, or none where all of it are negative."""

    def choose(
        self, pre: Float[Tensor, "n F"], k: int, ordered: bool = False
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """The largest of each group, and its column."""
        width = pre.shape[1] // k
        values, within = pre.unflatten(1, (k, width)).max(2)
        indices = within + within.new_tensor(range(0, k * width, width))
        if not ordered:
            return values, indices
        values, order = values.sort(1, descending=True)
        return values, indices.gather(1, order)
