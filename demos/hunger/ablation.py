"""The named head cut at the named source, in the real model: does the latent fall, and the word?

The head is the one that the trace of the study's prompt names (`circuit`); it is cut at the cue of every scored
sentence. Controls are other heads of the layers below the latent, drawn at random, cut at the same source.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.interventions import intervened
from demos.hunger import heads, stats
from demos.hunger.concepts import Concept
from demos.hunger.selection import sides
from demos.hunger.stages import Found
from demos.hunger.subject import Ends, Sentences, Subject, ends
from hooked_mamba.frozen.places import Part


def cue_mask(subject: Subject, concept: Concept) -> tuple[Sentences, Bool[Tensor, "b l"]]:
    """The scored sentences with a cue, and where it stands."""
    pairs = concept.pairs("score", subject.options.words)
    cues, _ = sides(subject, pairs)
    swapped = Sentences.of(subject.model, [pair.swapped for pair in pairs])
    mask = torch.zeros_like(cues.mask, dtype=torch.bool)
    for i, pair in enumerate(pairs):
        mask[i, cues.columns(i, pair.differing(cues.row(i), swapped.row(i)))] = True
    return cues, mask


def preactivation(subject: Subject, found: Found, seen: Ends) -> Float[Tensor, " b"]:
    """The chosen latent before its threshold."""
    return subject.coders[found["coder"]].preact(seen.x[found["coder"]])[:, found["feature"]]


def measure(subject: Subject, concept: Concept, found: Found, named: tuple[Part, int]) -> Found:
    """Mean changes of the latent's pre-activation and of the word's log-probability, and those by other heads.

    Parameters
    ----------
    named
        Layer (or its branch) and unit, see `heads`.
    """
    options, word = subject.options, subject.token(concept.word)
    sentences, mask = cue_mask(subject, concept)
    before = ends(subject, sentences)

    def changes(part: Part, unit: int) -> tuple[Tensor, Tensor]:
        with intervened(subject.model, heads.cut(part, unit, mask)):
            after = ends(subject, sentences)
        latent = preactivation(subject, found, after) - preactivation(subject, found, before)
        return latent, after.log_p[:, word] - before.log_p[:, word]

    mine = changes(*named)
    generator = torch.Generator().manual_seed(options.seed + 2)
    below = range(found["layer"] + (subject.kind == "output"))  # an output is what its own layer's heads add, too
    every = [head for head in heads.units(subject, below) if head != tuple(named)]
    drawn = [every[i] for i in torch.randperm(len(every), generator=generator)[: options.heads].tolist()]
    random = [changes(*head) for head in drawn]
    result: Found = {"head": list(named), "before": float(preactivation(subject, found, before).mean())}
    for i, what in enumerate(("latent", "word")):
        # A loss is what is judged, so that beside() counts controls that lose as much.
        result[what] = stats.mean_interval(mine[i], options.resamples, options.seed)
        lost = torch.stack([-one[i].mean() for one in random])
        result[f"{what}_beside"] = stats.beside(-float(mine[i].mean()), lost)
    return result
