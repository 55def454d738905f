"""Does a model know the story: how well its own lead of the feeling's word tells sentences with a cue from others.

The lead is one logit less another at the last token ("... I'm so"): " hungry" over " sad". Its area under the curve is
how often a sentence with a cue has more of it than one without, over all pairs of such sentences of one half of a
concept (`demos.hunger.concepts`). Where the model itself can not tell them apart, no latent can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from demos.hunger import stats
from demos.hunger.concepts import CONCEPTS, Concept, HalfName


@torch.no_grad()
def leads(model: Any, concept: Concept, texts: Sequence[str]) -> Float[Tensor, " b"]:
    """The lead of the concept's word after each text, nats."""
    tokens, mask = model.to_tokens_and_mask(list(texts), padding_side="left")
    ends = model(tokens, attention_mask=mask)[:, -1]
    return ends[:, model.to_single_token(concept.word)] - ends[:, model.to_single_token(concept.against)]


def lead_area(model: Any, concept: Concept, half: HalfName, words: int = 8) -> float:
    """The area of the model's own lead on one half, 0.5 where it tells nothing.

    Parameters
    ----------
    words
        Words of the half that are put into every frame, at most.
    """
    pairs = concept.pairs(half, words)
    cues, others = (leads(model, concept, texts) for texts in ([p.cue for p in pairs], [p.other for p in pairs]))
    return float(stats.auc(cues, others))


def area_table(model: Any) -> str:
    """A Markdown table of all concepts' areas on both halves."""
    lines = ["| word, over another | sentences of the half to find on | of the half that scores |", "|---|---|---|"]
    for c in CONCEPTS:
        areas = [lead_area(model, c, half) for half in ("find", "score")]
        lines.append(f"|{c.word} over{c.against} | {areas[0]:.3f} | {areas[1]:.3f} |")
    return "\n".join(lines)
