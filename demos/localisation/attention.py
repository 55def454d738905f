"""Scores of positions from hidden attention, its layer and channels chosen on other prompts than those it is judged on.

No intervention here, one forward pass is read: |alpha[t,s]| of chosen channels, t the question (Ali et al. 2024,
arXiv:2403.01590; the skip D, which is no attention to another position, is left out). Its sources are the scan's: u_s,
in which the convolution has already mixed the tokens s-K+1 to s. `by_token` carries each channel's row back through
the convolution, |sum_k alpha[t,s+k] sigma_{s+k} kappa[K-1-k] p_s|: what channel e gets from token s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from demos.localisation.stats import Rate
from hooked_mamba import HookedModel
from hooked_mamba.analysis.tasks import Prompts

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of channels whose rows are averaged, to choose from."""


@dataclass(frozen=True)
class Choice:
    """What was chosen on the other prompts."""

    layer: int
    channels: list[int]
    rate: Rate
    """How often it named the position there."""


@torch.no_grad()
def rows_of_question(model: HookedModel, prompts: Prompts, by_token: bool) -> Float[Tensor, "layer e b s"]:
    """Each channel's row of the last position, absolute values that sum to 1."""
    _, cache = model.run_with_cache(prompts.tokens)
    layers = []
    for i in range(model.cfg.n_layers):
        alpha = cache.hidden_attention(i, queries=[-1], include_skip=False)  # b e 1 s
        if by_token:
            source = rearrange(alpha, "b e q s -> b q s e 1")
            sent, _ = cache.token_path(i).split_tokens(source, slice(None), 1)
            alpha = rearrange(sent, "b q s e 1 -> b e q s")
        rows = alpha[:, :, 0].abs()
        layers.append(rearrange(rows / rows.sum(-1, keepdim=True).clamp(min=1e-30), "b e s -> e b s"))
    return torch.stack(layers)


def choose(rows: Float[Tensor, "layer e b s"], place: Tensor) -> Choice:
    """The layer and the channels whose mean row names `place` most often: each layer's best 1, 2, 4, ... are tried."""
    n = rows.shape[2]
    hits = (rows.argmax(-1) == place).sum(-1)  # layer e
    best: Choice | None = None
    for layer, order in enumerate(hits.argsort(dim=-1, descending=True, stable=True).tolist()):
        for count in sorted({min(count, len(order)) for count in COUNTS}):
            channels = sorted(order[:count])
            found = Rate(int((rows[layer, channels].mean(0).argmax(-1) == place).sum()), n)
            if best is None or found.hits > best.rate.hits:
                best = Choice(layer, channels, found)
    assert best is not None  # a model has a layer
    return best


def attention_scores(rows: Float[Tensor, "layer e b s"], choice: Choice) -> Float[Tensor, "pos b"]:
    """The mean row of the chosen channels."""
    return rows[choice.layer, choice.channels].mean(0).t()
