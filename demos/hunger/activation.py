"""The latent turned up at the last token of sentences without a cue, beside random latents of its kind.

Controls are as often active as the latent (see `natural.matched`) and are set so high that what they add is as long:
value times the norm of the decoder row is the same for all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from demos.hunger import stats
from demos.hunger.concepts import Concept
from demos.hunger.natural import matched
from demos.hunger.selection import sides
from demos.hunger.stages import Found
from demos.hunger.subject import Sentences, Subject, ends
from saes import set_features

STRENGTHS = (1, 2, 5)
"""Times the natural maximum."""
JUDGED = 2
"""The strength that claims are about."""


def as_long(subject: Subject, found: Found, feature: int) -> float:
    """What another latent must be for its row to be as long as the chosen one's at its natural maximum."""
    rows = subject.coders[found["coder"]].W_dec.norm(dim=1)
    return float(found["maximum"] * rows[found["feature"]] / rows[feature].clamp_min(1e-6))


def turned_up(subject: Subject, found: Found, feature: int, times: float, sentences: Sentences) -> Float[Tensor, "b v"]:
    """Log-probabilities after the sentences with a latent at `times` the natural maximum (of a control: as long)."""
    values = {feature: times * as_long(subject, found, feature)}
    with set_features(subject.model, subject.coders[found["coder"]], values, positions=-1):
        return ends(subject, sentences).log_p


def measure(subject: Subject, concept: Concept, found: Found, natural: Found) -> Found:
    """By strength, what the latent and its controls do to the word's log-probability, and how often it comes first."""
    options, word = subject.options, subject.token(concept.word)
    _, others = sides(subject, concept.pairs("score", options.words))
    before = ends(subject, others).log_p
    controls = matched(natural, found["coder"], found["feature"], options.controls, options.seed + 1)
    rows = []
    for times in STRENGTHS:
        after = turned_up(subject, found, found["feature"], times, others)
        change = after[:, word] - before[:, word]
        random = torch.stack(
            [(turned_up(subject, found, c, times, others)[:, word] - before[:, word]).mean() for c in controls]
        )
        rows.append(
            {
                "times": times,
                "effect": stats.mean_interval(change, options.resamples, options.seed),
                "beside": stats.beside(float(change.mean()), random),
                "random": random.tolist(),
                "first": float((after.argmax(1) == word).double().mean()),
                "probability": float(after[:, word].exp().mean()),
            }
        )
    return {
        "before": {
            "probability": float(before[:, word].exp().mean()),
            "first": float((before.argmax(1) == word).double().mean()),
        },
        "controls": controls,
        "rows": rows,
    }
