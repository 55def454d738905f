"""Claims that need a model that knows the story, and a cause that is known because it was planted.

Thresholds were written down before any of these was measured for a model that knows the story.
"""

from __future__ import annotations

from demos.hunger.claims import Claim, span
from demos.hunger.stages import Found

KNOWS = 0.95
"""Least area of the model's own lead on the scored half."""
EXCESS, DIVERGENCE = 0.03, 0.08
"""Of all layers replaced at once, without errors: most nats above the model's own loss, and largest KL."""
THROUGH = 0.9
"""Least share of sentences whose traced circuit has the cue as its most important word."""
SLOPE = (0.8, 1.25)
CORRELATION = 0.8
"""Of the real change on the predicted, over sentences."""
LOWER = 0.9
"""Least share of sentences in which cutting at the cue lowers the lead more than cutting at another word."""


def judge_planted(cutting: Found, together: Found) -> list[Claim]:
    """The claims about one model and kind of dictionaries.

    Parameters
    ----------
    cutting
        Of `cutting.measure`.
    together
        Losses of all layers replaced at once, of `demos.dictionaries.bundle`; empty where they were not measured.
    """
    known = {"ce_spliced", "ce_clean", "kl"} <= together.keys()
    excess = together["ce_spliced"] - together["ce_clean"] if known else float("inf")
    kl = together["kl"] if known else float("inf")
    slope = cutting["slope"]["value"]
    return [
        Claim(
            "the model knows",
            "The model's own lead of the word tells the scored sentences with a cue from those without",
            f"AUC at least {KNOWS}",
            f"{cutting['model_auc']:.3f}",
            cutting["model_auc"] >= KNOWS,
        ),
        Claim(
            "all layers",
            "The model works with dictionaries in all layers at once, without their errors",
            f"at most {EXCESS} nats above its loss, KL at most {DIVERGENCE}",
            f"{excess:.3f} nats, KL {kl:.3f}" if known else "not measured",
            excess <= EXCESS and kl <= DIVERGENCE,
        ),
        Claim(
            "through the cue",
            f"In the circuits of {cutting['sentences']} sentences the features at the cue matter most of all words'",
            f"in at least {THROUGH:.0%}",
            f"{span(cutting['through'], '{:.0%}')}; random {cutting['chance']:.0%}",
            cutting["through"]["value"] >= THROUGH,
        ),
        Claim(
            "slope",
            "Cutting them in the real model moves the word's lead as much as the graph says",
            f"slope from {SLOPE[0]} to {SLOPE[1]}",
            span(cutting["slope"]),
            SLOPE[0] <= slope <= SLOPE[1],
        ),
        Claim(
            "correlation",
            "And it moves it most where the graph says so",
            f"correlation at least {CORRELATION}",
            span(cutting["correlation"]),
            cutting["correlation"]["value"] >= CORRELATION,
        ),
        Claim(
            "the cue and no other word",
            "Cutting at the cue lowers the lead more than cutting at another word of the sentence",
            f"in at least {LOWER:.0%} of the sentences",
            f"{cutting['lower']:.0%}",
            cutting["lower"] >= LOWER,
        ),
    ]
