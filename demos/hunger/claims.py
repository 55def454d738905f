"""The story's claims, each with what it needs to hold. Thresholds were written down before any result was seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from demos.hunger.activation import JUDGED
from demos.hunger.heads import words
from demos.hunger.stages import Found

AUC = 0.9
"""Least area under the curve on sentences that the latent was not chosen on."""
NEAREST = 10
"""Rank among the token embeddings that the word must reach."""
EXPLAINED, RECOVERED, DEAD, ACTIVE = 0.7, 0.8, 0.1, 64
"""Of a dictionary: least explained variance and recovered loss, most dead latents and active ones a position."""


@dataclass(frozen=True)
class Claim:
    """One claim about one model."""

    name: str
    says: str
    needs: str
    found: str
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def span(interval: Found, form: str = "{:.2f}") -> str:
    """A value and its interval."""
    low, high = form.format(interval["low"]), form.format(interval["high"])
    return f"{form.format(interval['value'])} ({low} to {high})"


def against(beside: Found, form: str = "{:+.2f}") -> str:
    """A value, and the interval of its controls."""
    low, high = form.format(beside["low"]), form.format(beside["high"])
    return f"{form.format(beside['value'])}; random {low} to {high}"


def quality(metrics: Found) -> list[Claim]:
    """The gates that a dictionary has to pass before its latents are believed."""
    ev, recovered, dead, l0 = (metrics[name] for name in ("ev", "ce_recovered_zero", "dead_share", "l0"))
    return [
        Claim(
            "gate: variance",
            "The dictionary explains what it predicts",
            f"EV at least {EXPLAINED}",
            f"{ev:.2f}",
            ev >= EXPLAINED,
        ),
        Claim(
            "gate: loss",
            "The model works on what the dictionary predicts",
            f"at least {RECOVERED:.0%} of the loss recovered",
            f"{recovered:.0%}",
            recovered >= RECOVERED,
        ),
        Claim(
            "gate: sparsity",
            "Its latents are few at a time and in use",
            f"at most {ACTIVE} active, {DEAD:.0%} dead",
            f"{l0:.0f} active, {dead:.1%} dead",
            l0 <= ACTIVE and dead <= DEAD,
        ),
    ]


def judge(results: Found) -> list[Claim]:
    """All claims about one model and concept.

    Parameters
    ----------
    results
        By stage: scored, activation, geometry, steering, circuit, ablation, swap, and the coder's metrics.
    """
    scored, geometry, swap = results["scored"], results["geometry"], results["swap"]
    turned = next(row for row in results["activation"]["rows"] if row["times"] == JUDGED)
    steering = next(row for row in results["steering"]["rows"] if row["times"] == JUDGED)
    circuit, ablation = results["circuit"], results["ablation"]
    outside = "above the middle 95% of random latents"
    claims = quality(results["metrics"])
    claims += [
        Claim(
            "reads",
            "The latent tells unseen sentences with a cue from those without",
            f"AUC at least {AUC}",
            span(scored["auc"]),
            scored["auc"]["value"] >= AUC,
        ),
        Claim(
            "beats a token",
            "It does so better than any single token",
            "95% interval of the difference above 0",
            span(scored["more"], "{:+.2f}"),
            scored["more"]["low"] > 0,
        ),
        Claim(
            "says",
            f"At {JUDGED} times its natural maximum it makes the word likelier",
            outside,
            against(turned["beside"]) + " nats",
            turned["beside"]["value"] > turned["beside"]["high"],
        ),
        Claim(
            "points at the word",
            "Its decoder row is near the word's embedding",
            f"among the {NEAREST} nearest tokens",
            f"rank {geometry['rank']:,} of {geometry['tokens']:,}",
            geometry["rank"] <= NEAREST,
        ),
        Claim(
            "steers",
            f"Stories told at {JUDGED} times mention the feeling more often",
            outside,
            against(steering["beside"], "{:+.0%}"),
            steering["beside"]["value"] > steering["beside"]["high"],
        ),
        Claim(
            "circuit",
            "In the study's prompt its strongest head reads the cue",
            "the source is the cue",
            f"{words(*circuit['heads'][0][:2])}, at {circuit['tokens'][circuit['heads'][0][2]]!r}",
            circuit["heads"][0][2] in circuit["cue"],
        ),
        Claim(
            "circuit elsewhere",
            "In the scored sentences the strongest head reads the cue",
            "more often than a token drawn at random",
            f"{span(circuit['scored']['heads'], '{:.0%}')}; random {circuit['scored']['chance']:.0%}",
            circuit["scored"]["heads"]["low"] > circuit["scored"]["chance"],
        ),
        Claim(
            "head carries the latent",
            "The latent falls when the prompt's head is cut at the cue",
            "by more than the middle 95% of random heads",
            against(lost(ablation["latent_beside"]), "{:+.3f}"),
            ablation["latent_beside"]["value"] > ablation["latent_beside"]["high"],
        ),
        Claim(
            "head carries the word",
            "The word becomes less likely when the prompt's head is cut at the cue",
            "by more than the middle 95% of random heads",
            against(lost(ablation["word_beside"]), "{:+.4f}") + " nats",
            ablation["word_beside"]["value"] > ablation["word_beside"]["high"],
        ),
        Claim(
            "swap moves the latent",
            "The latent falls more when the cue gives way to another word than to another cue",
            "95% interval of the difference below 0",
            span(swap["latent"]["more"], "{:+.2f}"),
            swap["latent"]["more"]["high"] < 0,
        ),
        Claim(
            "swap moves the word",
            "The word becomes less likely when the cue gives way to another word than to another cue",
            "95% interval of the difference below 0",
            span(swap["word"]["more"], "{:+.2f}") + " nats",
            swap["word"]["more"]["high"] < 0,
        ),
    ]
    return claims


def lost(beside: Found) -> Found:
    """A loss as a change."""
    return {"value": -beside["value"], "low": -beside["high"], "high": -beside["low"]}


ESSENTIAL = ("reads", "says", "steers")
"""Claims without which there is no feature to speak of: another concept is looked for where one of them fails."""
