"""Scores of positions from interventions: how much each position's edit moves the answer, prompt by prompt.

Scores are position x prompt; the position with the highest one is what the tool names.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from demos.localisation.stats import Rate
from hooked_mamba import HookedModel, patching
from hooked_mamba.analysis import knockout_sweep
from hooked_mamba.analysis.tasks import Prompts
from hooked_mamba.frozen.tokens import Source

ROWS = 1024
"""Rows of one forward pass: prompts times edits that run side by side."""


def answer_log_probability(prompts: Prompts) -> Callable[[Tensor], Tensor]:
    """From logits b l V to the answers' log-probabilities after the question, nats, one per row."""

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].log_softmax(-1).gather(1, prompts.answers[:, None])[:, 0]

    return metric


def lead(clean: Prompts, corrupted: Prompts) -> Callable[[Tensor], Tensor]:
    """From logits to logit(clean answer) - logit(corrupted answer), one per row."""

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, clean.answers[:, None]) - last.gather(1, corrupted.answers[:, None]))[:, 0]

    return metric


def patching_scores(
    model: HookedModel, clean: Prompts, corrupted: Prompts, metric: Callable[[Tensor], Tensor], progress: bool = True
) -> Float[Tensor, "layer pos b"]:
    """Exhaustive activation patching of the residual stream: each layer's each position, from clean into corrupted.

    The score is what a patch does to the metric, as a share of the way from the corrupted run (0) to the clean one (1).
    """
    logits, cache = model.run_with_cache(clean.tokens, names_filter="blocks.*.hook_resid_pre")
    sweep = patching.get_act_patch_resid_pre(model, corrupted.tokens, cache, metric, batch_size=ROWS, progress=progress)
    low, high = metric(model(corrupted.tokens)), metric(logits)
    return (sweep - low) / (high - low)


def knockout_scores(
    model: HookedModel,
    prompts: Prompts,
    source: Source,
    window: int = 1,
    to_all: bool = False,
    progress: bool = True,
) -> Float[Tensor, "window pos b"]:
    """Knockout of each position's values in each window of layers; the score is the loss of log P(answer), nats.

    Parameters
    ----------
    source
        "token": what the token sends through all taps of the convolution. "scan": the terms alpha[t,s] u_s.
    window
        Layers that are cut together.
    to_all
        Whether every position loses sight of the source, or the last alone, where the question stands.
    """
    metric = answer_log_probability(prompts)
    targets = None if to_all else -1
    cut = knockout_sweep(model, prompts.tokens, metric, targets, source, window, batch_size=ROWS, progress=progress)
    return metric(model(prompts.tokens)) - cut


def knockout_options(
    model: HookedModel, prompts: Prompts, source: Source = "token", progress: bool = True
) -> dict[tuple[int, ...], Float[Tensor, "pos b"]]:
    """Knockout to the question in all layers at once, and in each alone; keys are the layers."""
    n_layers = model.cfg.n_layers
    found = {tuple(range(n_layers)): knockout_scores(model, prompts, source, n_layers, progress=progress)[0]}
    if n_layers > 1:
        one = knockout_scores(model, prompts, source, progress=progress)
        found |= {(i,): scores for i, scores in enumerate(one)}
    return found


def best_layers(options: dict[tuple[int, ...], Float[Tensor, "pos b"]], where: Tensor) -> tuple[tuple[int, ...], Rate]:
    """The layers whose knockout names `where` most often, and how often; the first of equals."""
    rates = {layers: Rate(int((scores.argmax(0) == where).sum()), len(where)) for layers, scores in options.items()}
    layers = max(rates, key=lambda layers: rates[layers].hits)
    return layers, rates[layers]
