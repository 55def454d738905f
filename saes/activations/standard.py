"""Standard: rectified pre-activations, with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity).

The penalty weighs each latent by the norm of its decoder row (Anthropic, April 2024 update), so the norms need no
constraint and cannot grow to escape it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from saes.activations.base import At, Bounded, Latents
from saes.loss_state import LossState
from saes.parameters import CoderParameters


class Standard(Bounded):
    """relu(pre)."""

    def infer(self, coder: CoderParameters, pre: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """Dense latents."""
        return pre.relu()

    def latents(self, coder: CoderParameters, pre: Float[Tensor, "..."], at: At, state: LossState) -> Latents:
        """Values and their L1 norm in units of the reconstruction."""
        values = pre.relu()
        return Latents(values, None, 0, penalty=(values * coder.W_dec.norm(dim=1)[at]).sum())
