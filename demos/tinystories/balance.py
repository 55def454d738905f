"""The load of experts: a term of the loss that evens it out, and how even it became.

    balance = X sum_e f_e P_e          f_e share of the choices that fall on expert e, P_e its mean probability

averaged over the layers with experts (Fedus et al. 2021, arXiv:2101.03961, eq. 4); 1 where all are used alike.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGITS, CHOSEN = "moe.hook_router_logits", "moe.hook_expert_indices"


class Balance:
    """Collects what routers do during a forward pass, through hooks."""

    def __init__(self, model: Any) -> None:
        self.places = [name.removesuffix(LOGITS) for name in model.hook_dict if name.endswith(LOGITS)]
        self.seen: dict[str, Tensor] = {}

    def hooks(self) -> list[tuple[str, Any]]:
        """Forward hooks that keep each router's logits and choices."""
        return [(place + site, self._keep) for place in self.places for site in (LOGITS, CHOSEN)]

    def _keep(self, value: Tensor, hook: Any) -> None:
        self.seen[hook.name] = value

    def loss(self) -> Tensor:
        """The term of the last pass, with its gradient."""
        terms = [balance(self.seen[place + LOGITS], self.seen[place + CHOSEN]) for place in self.places]
        return torch.stack(terms).mean()


def balance(logits: Float[Tensor, "b l X"], chosen: Int[Tensor, "b l k"]) -> Float[Tensor, ""]:
    """The term of one layer."""
    n_experts = logits.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()
    return n_experts * (share * logits.softmax(-1).flatten(0, -2).mean(0)).sum()


@torch.no_grad()
def expert_shares(model: Any, batches: list[Tensor]) -> dict[int, list[float]]:
    """For each layer with experts, the share of the choices that fall on each of them, over rows b l of tokens."""
    found = Balance(model)
    counts: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=found.hooks()):
        for tokens in batches:
            model(tokens, return_type=None)
            for place in found.places:
                n_experts = found.seen[place + LOGITS].shape[-1]
                count = torch.bincount(found.seen[place + CHOSEN].flatten(), minlength=n_experts)
                counts[place] = counts.get(place, 0) + count
    return {int(place.split(".")[1]): (n / n.sum()).tolist() for place, n in counts.items()}
