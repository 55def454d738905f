"""How active latents are when the model is left to itself: on stories of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from demos.hunger.stages import Found
from demos.hunger.subject import Subject
from saes import encode_on


def own_stories(subject: Subject) -> Int[Tensor, "n l"]:
    """Stories from the end-of-text token on, temperature 1, one seed for all."""
    model, options = subject.model, subject.options
    assert model.bos_token_id is not None  # the bundled tokenizers have one
    start = torch.full((options.stories, 1), model.bos_token_id)
    return model.generate(
        start,
        max_new_tokens=options.story_tokens,
        stop_at_eos=False,
        verbose=False,
        generator=torch.Generator().manual_seed(options.seed),
    )


def measure(subject: Subject) -> Found:
    """Every latent's share of active tokens and largest value in these stories."""
    tokens = own_stories(subject)
    found: dict[str, Any] = {}
    for name, coder in subject.coders.items():
        active, largest = torch.zeros(coder.cfg.d_sae), torch.zeros(coder.cfg.d_sae)
        for part in tokens.split(32):
            z = encode_on(subject.model, {name: coder}, part).dense(name)[:, 1:].flatten(0, 1)
            active += (z > 0).sum(0)
            largest = torch.maximum(largest, z.amax(0))
        share = active / (tokens.shape[0] * (tokens.shape[1] - 1))
        found[name] = {"share": share.tolist(), "largest": largest.tolist()}
    return {"tokens": tokens[:, 1:].numel(), "coders": found}


def matched(natural: Found, coder: str, feature: int, n: int, seed: int) -> list[int]:
    """n other latents of a coder, drawn at random among the 4n that are active about as often.

    Their length is matched when they are used: see `turned_up`.
    """
    share = natural["coders"][coder]["share"]
    least = 0.5 / natural["tokens"]
    here = math.log(max(share[feature], least))
    alive = [i for i, s in enumerate(share) if s > 0 and i != feature]
    nearest = sorted(alive, key=lambda i: (abs(math.log(share[i]) - here), i))[: 4 * n]
    order = torch.randperm(len(nearest), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(nearest[i] for i in order[:n])
