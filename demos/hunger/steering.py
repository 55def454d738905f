"""Stories told with the latent turned up at every token: do they mention the feeling, and are they still stories?"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demos.hunger import stats
from demos.hunger.activation import JUDGED, STRENGTHS, as_long
from demos.hunger.concepts import Concept
from demos.hunger.natural import matched
from demos.hunger.stages import Found
from demos.hunger.subject import Sentences, Subject
from saes import steer

STARTS = (
    "One day, Tom went to the park with his mom.",
    "Lily has a red ball.",
    "The sun is in the sky.",
    "Ben and Mia are friends.",
    "There is a big tree near the house.",
    "A boy had a blue car.",
    "They walked along the road.",
    "Sue likes to read books.",
    "The cat sat on the mat.",
    "It was a nice day.",
)
"""How the stories begin, in turn; they mention none of the feelings."""
ARMS_OF_CONTROLS = 20
"""Random latents that have an arm of their own, at most."""


def measure(subject: Subject, concept: Concept, found: Found, natural: Found) -> Found:
    """One arm without steering, one for each strength, and one for each strength of each control.

    All arms draw with the same seed.
    """
    options = subject.options
    n = options.generations
    starts = Sentences.of(subject.model, [STARTS[i % len(STARTS)] for i in range(n)])
    lexicon = re.compile(rf"\b(?:{'|'.join(concept.lexicon)})\b", re.I)
    word = re.compile(rf"\b{re.escape(concept.word.strip())}\b", re.I)
    controls = matched(natural, found["coder"], found["feature"], options.controls, options.seed + 1)
    controls = controls[:: max(1, len(controls) // ARMS_OF_CONTROLS)][:ARMS_OF_CONTROLS]

    def arm(feature: int | None, times: float) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"], Tensor, list[str]]:
        tokens, real = told(subject, starts, steered(subject, found, feature, times))
        texts = [str(subject.model.to_string(row[mask])) for row, mask in zip(tokens, real, strict=True)]
        speaks, says = (torch.tensor([bool(p.search(t)) for t in texts]) for p in (lexicon, word))
        return speaks, says, surprise(subject, starts, tokens, real), texts

    def row(speaks: Tensor, says: Tensor, nats: Tensor, texts: list[str]) -> dict[str, Any]:
        loss = stats.mean_interval(nats, options.resamples, options.seed)
        return {
            "speaks": stats.mean_interval(speaks.double(), options.resamples, options.seed),
            "says": stats.mean_interval(says.double(), options.resamples, options.seed),
            "perplexity": {end: float(torch.tensor(value).exp()) for end, value in loss.items()},
            "samples": [start + text for start, text in zip(STARTS[:3], texts[:3], strict=True)],
        }

    plain = arm(None, 0)
    rows = []
    for times in STRENGTHS:
        mine = arm(found["feature"], times)
        random = [arm(c, times) for c in controls]
        gain = torch.stack([speaks.double().mean() for speaks, *_ in random]) - plain[0].double().mean()
        more = mine[0].double() - plain[0].double()
        rows.append(
            {
                "times": times,
                **row(*mine),
                "gain": stats.mean_interval(more, options.resamples, options.seed),
                "beside": stats.beside(float(more.mean()), gain),
                "random": gain.tolist(),
                "random_perplexity": float(torch.stack([nats.mean() for _, _, nats, _ in random]).mean().exp()),
            }
        )
    return {"judged": JUDGED, "generations": n, "controls": controls, "plain": row(*plain), "rows": rows}


def steered(subject: Subject, found: Found, feature: int | None, times: float) -> AbstractContextManager[Any]:
    """The model with a latent turned up at all tokens, or as it is."""
    if feature is None:
        return nullcontext()
    return steer(subject.model, subject.coders[found["coder"]], feature, times * as_long(subject, found, feature))


def told(
    subject: Subject, starts: Sentences, context: AbstractContextManager[Any]
) -> tuple[Int[Tensor, "n new"], Bool[Tensor, "n new"]]:
    """New tokens after the starts, temperature 1, and which of them come before the story's end."""
    model, options = subject.model, subject.options
    with context:
        tokens = model.generate(
            starts.tokens,
            attention_mask=starts.mask,
            max_new_tokens=options.new_tokens,
            return_type="tokens",
            verbose=False,
            generator=torch.Generator().manual_seed(options.seed),
        )
    new = tokens[:, starts.tokens.shape[1] :]
    return new, (new == model.eos_token_id).cumsum(1) == 0


def surprise(
    subject: Subject, starts: Sentences, new: Int[Tensor, "n new"], real: Bool[Tensor, "n new"]
) -> Float[Tensor, " n"]:
    """Nats a token of each story to the model without steering; 0 where a story ended at once."""
    tokens = torch.cat([starts.tokens, new], 1)
    mask = torch.cat([starts.mask, torch.ones_like(new)], 1)
    log_p = subject.model(tokens, attention_mask=mask)[:, starts.tokens.shape[1] - 1 : -1].log_softmax(-1)
    nats = -log_p.gather(2, new[..., None])[..., 0]
    return (nats * real).sum(1) / real.sum(1).clamp_min(1)
