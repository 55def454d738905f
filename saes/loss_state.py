"""The state of a coder's loss besides the batch: its coefficients, and how long each latent has been silent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saes.parameters import CoderParameters

THRESHOLD_RATE = 0.01
"""How fast the threshold for inference follows the smallest active value."""


@dataclass
class LossState:
    """What the loss needs to know besides the batch, and what it remembers between steps."""

    since_fired: Int[Tensor, " F"]
    """Tokens since each latent was last active."""
    dead_after: int = 10_000_000
    """Tokens without activity after which a latent counts as dead."""
    aux_alpha: float | int = 1 / 32
    """Weight of the dead latents' loss; 0 leaves it out."""
    aux_k: int | None = None
    """How many dead latents reconstruct the error. None: k, so that they become as sparse as the others; half of d_out
    where the architecture has no k."""
    wide_alpha: float | int = 0.0
    """Weight of the wide reconstruction (topk, batchtopk); 0 leaves it out."""
    sparsity: float | int = 0.0
    """Weight of the penalty (standard, gated: L1; jumprelu: the number of active latents)."""
    bandwidth: float | int = 0.1
    """Width of the window in which JumpReLU's thresholds get gradients."""

    @classmethod
    def of(cls, coder: CoderParameters, **settings: float | int | None) -> LossState:
        """For a coder at its first step: nothing is dead yet."""
        since = torch.zeros(coder.cfg.d_sae, dtype=torch.long, device=coder.W_dec.device)
        return cls(since, **settings)  # type: ignore[arg-type]  # the fields' own types

    @property
    def dead(self) -> Bool[Tensor, " F"]:
        """Latents that have been inactive for longer than `dead_after`."""
        return self.since_fired > self.dead_after

    @torch.no_grad()
    def observe(
        self, coder: CoderParameters, fired: Bool[Tensor, " F"], tokens: int, least: Tensor | None = None
    ) -> None:
        """After a step: count inactivity, and move the threshold for inference towards the smallest active value."""
        self.since_fired = torch.where(fired, 0, self.since_fired + tokens)
        if least is not None:
            first = coder.threshold == 0
            coder.threshold.copy_(torch.where(first, least, torch.lerp(coder.threshold, least, THRESHOLD_RATE)))
