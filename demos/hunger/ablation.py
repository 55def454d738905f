"""The named head cut at the named source, in the real model: does the latent fall, and the word?

The head is the one that the trace of the study's prompt names (`circuit`); it is cut at the cue of every scored
sentence. Controls are other heads of the layers below the latent, drawn at random, cut at the same source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demos.hunger import stats
from demos.hunger.concepts import Concept
from demos.hunger.selection import sides
from demos.hunger.stages import Found
from demos.hunger.subject import Ends, Sentences, Subject, ends
from hooked_mamba import HookedMamba
from hooked_mamba.analysis.captured import captured
from hooked_mamba.hook_points import HookPoint
from hooked_mamba.scan_view import run_scan


@contextmanager
def without_head(model: HookedMamba, layer: int, channel: int, sources: Bool[Tensor, "b l"]) -> Iterator[None]:
    """One channel without what chosen tokens send through its convolution and scan; dt, B, C and gates are free."""
    names = [f"blocks.{layer}.mixer.hook_{site}" for site in ("x_pre", "conv", "x", "dt", "B", "C")]

    def cut(y: Tensor, hook: HookPoint) -> Tensor:
        lane = cache.scan_view(layer).lanes([channel])
        gone = cache.token_path(layer).input_of(sources)[:, :, channel, None, None]
        y[:, :, channel] -= run_scan(lane.with_input(gone.to(lane.u.dtype)))[:, :, 0, 0]
        return y

    with captured(model, names) as cache, model.hooks([(f"blocks.{layer}.mixer.hook_y", cut)]):
        yield


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


def measure(subject: Subject, concept: Concept, found: Found, named: tuple[int, int]) -> Found:
    """Mean changes of the latent's pre-activation and of the word's log-probability, and those by other heads.

    Parameters
    ----------
    named
        Layer and channel.
    """
    options, word = subject.options, subject.token(concept.word)
    sentences, mask = cue_mask(subject, concept)
    before = ends(subject, sentences)

    def changes(layer: int, channel: int) -> tuple[Tensor, Tensor]:
        with without_head(subject.model, layer, channel, mask):
            after = ends(subject, sentences)
        latent = preactivation(subject, found, after) - preactivation(subject, found, before)
        return latent, after.log_p[:, word] - before.log_p[:, word]

    mine = changes(*named)
    generator = torch.Generator().manual_seed(options.seed + 2)
    below = int(found["coder"].split("-")[0].removeprefix("l"))
    every = [(layer, e) for layer in range(below) for e in range(subject.model.cfg.E) if (layer, e) != tuple(named)]
    drawn = [every[i] for i in torch.randperm(len(every), generator=generator)[: options.heads].tolist()]
    random = [changes(*head) for head in drawn]
    result: Found = {"head": list(named), "before": float(preactivation(subject, found, before).mean())}
    for i, what in enumerate(("latent", "word")):
        # A loss is what is judged, so that beside() counts controls that lose as much.
        result[what] = stats.mean_interval(mine[i], options.resamples, options.seed)
        lost = torch.stack([-one[i].mean() for one in random])
        result[f"{what}_beside"] = stats.beside(-float(mine[i].mean()), lost)
    return result
