"""Gated: one path decides whether a latent is active, another how much (Rajamanoharan et al. 2024, arXiv:2404.16014).

    gate = x W_enc + b_gate,   mag = exp(r_mag) x W_enc + b_mag,   z = [gate > 0] relu(mag)

The step function has no gradient: the gate learns from its L1 penalty and from a second reconstruction with relu(gate)
through a frozen decoder.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saes.activations.base import At, Bounded, Latents
from saes.loss_state import LossState
from saes.parameters import CoderParameters


class Gated(Bounded):
    """Pre-activations are the gate's."""

    def setup(self, coder: CoderParameters) -> None:
        """b_gate in place of b_enc; r_mag and b_mag start at 0."""
        for name in ("b_gate", "r_mag", "b_mag"):
            setattr(coder, name, nn.Parameter(torch.zeros(coder.cfg.d_sae)))

    def bias(self, coder: CoderParameters) -> Float[Tensor, " F"]:
        """The gate's."""
        return coder.b_gate

    def infer(self, coder: CoderParameters, pre: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """Dense latents."""
        return self._values(coder, pre, slice(None))

    def _values(self, coder: CoderParameters, gate: Tensor, at: At) -> Tensor:
        magnitude = coder.r_mag.exp()[at] * (gate - coder.b_gate[at]) + coder.b_mag[at]
        return torch.where(gate > 0, magnitude.relu(), 0.0)

    def latents(self, coder: CoderParameters, pre: Float[Tensor, "..."], at: At, state: LossState) -> Latents:
        """Values, the rectified gate, and its L1 norm in units of the reconstruction."""
        gate = pre.relu()
        norms = coder.W_dec.norm(dim=1).detach()  # the second reconstruction is frozen, and so is its scale
        return Latents(self._values(coder, pre, at), None, 0, penalty=(gate * norms[at]).sum(), gate=gate)
