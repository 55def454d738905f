"""The cost of running the model on a coder's output: nats per next token, and the divergence of its predictions.

    recovered by zero    (CE_zero - CE_spliced) / (CE_zero - CE_clean)        1: as good as the model, 0: as zeros
    recovered by mean    (CE_mean - CE_spliced) / (CE_mean - CE_clean)        0: as the site's mean, a harder baseline
    KL                   mean over positions of KL(clean || spliced)

Only positions whose next token is known count; pairs that touch padding do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

VARIANTS = ("clean", "spliced", "zero", "mean")
"""The model as it is; with coders in its place; with zeros there; with the mean over all counted positions."""


def next_token_log_probs(
    logits: Float[Tensor, "b l V"],
    tokens: Int[Tensor, "b l"],
    real: Bool[Tensor, "b l"],
    starts: Bool[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "n V"], Int[Tensor, " n"]]:
    """Log-probabilities at the positions whose next token is known, and that token; none is the first of a document."""
    pairs = real[:, :-1] & real[:, 1:]
    if starts is not None:
        pairs &= ~starts[:, 1:]
    return logits[:, :-1][pairs].log_softmax(-1), tokens[:, 1:][pairs]


class LossSums:
    """Sums of cross-entropies and divergences by variant."""

    def __init__(self) -> None:
        self.n = dict.fromkeys(VARIANTS, 0)
        self.ce = dict.fromkeys(VARIANTS, 0.0)
        self.divergence = 0.0

    @torch.no_grad()
    def add(
        self,
        variant: str,
        log_probs: Float[Tensor, "n V"],
        next_tokens: Int[Tensor, " n"],
        clean: Float[Tensor, "n V"] | None = None,
    ) -> None:
        """Take in one variant's log-probabilities; with those of the clean run, their divergence from it too.

        Raises
        ------
        FloatingPointError
            If a loss is NaN or infinite.
        """
        ce = -float(log_probs.gather(1, next_tokens.unsqueeze(1)).double().sum())
        if not math.isfinite(ce):
            raise FloatingPointError(f"the loss of the {variant} model is {ce}")
        self.ce[variant] += ce
        self.n[variant] += len(next_tokens)
        if clean is not None:
            p = clean.exp()
            terms = torch.where(p > 0, p * (clean - log_probs), 0.0)
            self.divergence += float(terms.sum(1).double().sum())

    def tensors(self) -> dict[str, Tensor]:
        """All sums, to be kept and merged."""
        sums = [*self.n.values(), *self.ce.values(), self.divergence]
        return {"sums": torch.tensor(sums, dtype=torch.float64)}

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add the predictions of other sums, as :meth:`tensors` gave them."""
        *found, divergence = other["sums"].tolist()
        for i, variant in enumerate(VARIANTS):
            self.n[variant] += int(found[i])
            self.ce[variant] += found[len(VARIANTS) + i]
        self.divergence += divergence

    def result(self) -> dict[str, float | None]:
        """ce_clean, ce_spliced, ce_zero, ce_mean, ce_recovered_zero, ce_recovered_mean and kl of what was added."""
        out: dict[str, float | None] = {
            f"ce_{variant}": self.ce[variant] / self.n[variant] for variant in VARIANTS if self.n[variant]
        }
        clean, spliced = out.get("ce_clean"), out.get("ce_spliced")
        for baseline in ("zero", "mean"):
            without = out.get(f"ce_{baseline}")
            if without is not None and clean is not None and spliced is not None:
                gap = without - clean
                out[f"ce_recovered_{baseline}"] = (without - spliced) / gap if gap != 0 else None
        if self.n["spliced"]:
            out["kl"] = self.divergence / self.n["spliced"]
        return out
