"""Hidden attention: which positions does a scan read, and does the model care?

The maps of Ali, Zimerman & Wolf 2024 (arXiv:2403.01590): a scan is a causal matrix, row t says how much of every
source position enters the output at t. Attention is no explanation by itself, so each map is held against knockout.

1. Maps of every layer, averaged over channels, and their rollout over layers.
2. The last row of each, and how well it goes with what the answer loses when a source is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from demos.studies.common import Model, Options, correlation
from demos.studies.facts import Case, known, to_last
from demos.studies.report import Report, Section, Table, layer_map
from demos.tour.measure import summarize
from hooked_mamba import ActivationCache
from hooked_mamba import analysis as an
from hooked_mamba.analysis.hidden_attention import all_layers


def run(model: Model, options: Options) -> Report:
    """The whole study."""
    report = Report(
        "attention",
        "Hidden attention, and whether it tells",
        "Every channel of a scan is a causal matrix, alpha: y at t is the sum over s of alpha[t, s] u at s, exactly."
        " Here are its rows, and how they compare with the real effect of cutting a source.",
        "After Ali, Zimerman & Wolf 2024, arXiv:2403.01590.",
        f"{model.cfg.model_name}: {summarize(model)}.",
    )
    cases = known(model, options.prompts)
    prompt = cases[0].prompt if cases else "Once upon a time, there was a little girl named Lily."
    _, cache = model.run_with_cache(prompt)
    report.sections += [maps_section(model, cache, prompt), last_row_section(model, cache, prompt)]
    if cases:
        report.sections.append(faithfulness_section(model, cases))
    return report


def maps_section(model: Any, cache: ActivationCache, prompt: str) -> Section:
    """One map a layer; the first four of them where there are more."""
    words = model.to_str_tokens(prompt)
    rows = [f"{word} {t}" for t, word in enumerate(words)]
    n = model.cfg.n_layers
    chosen = sorted({round(k * (n - 1) / 3) for k in range(4)})
    plots = [
        layer_map(cache.hidden_attention(i, average=True)[0], words, f"layer {i}, mean of alpha", "{:+.4f}", rows)
        for i in chosen
    ]
    return Section(
        "The maps",
        f"“{prompt}” Targets down, sources across; the mean over channels, the skip D on the diagonal.",
        plots=plots,
    )


SCORES: dict[str, Callable[[ActivationCache, int, Case], Tensor]] = {
    "|mean of alpha|": lambda cache, i, case: an.attention_map(cache, i, "mean", -1).abs(),
    "mean of |alpha|": lambda cache, i, case: an.attention_map(cache, i, "abs", -1),
    "mean of |alpha u|": lambda cache, i, case: an.attention_map(cache, i, "flow", -1),
    "|direct effect| of the token": lambda cache, i, case: direct(cache, i, case, "token"),
    "|direct effect| of the scan's term": lambda cache, i, case: direct(cache, i, case, "scan"),
}
"""Ways to score a layer's sources for the last position: batch, source."""


def direct(cache: ActivationCache, layer: int, case: Case, source: Any) -> Tensor:
    """How much of the logit difference each source gives by this layer alone, without a sign."""
    model = cache.model
    onto = (model.W_U[:, case.answer] - model.W_U[:, case.other]) * model.ln_final.weight  # type: ignore[union-attr]
    values = cache.stack_source_results(layer, source, pos_slice=-1, project_output_onto=onto)
    assert isinstance(values, Tensor)
    return values[:-1].t().abs()


def last_row_section(model: Any, cache: ActivationCache, prompt: str) -> Section:
    """What the last position reads, layer by layer and rolled out."""
    words = model.to_str_tokens(prompt)
    rows = all_layers(cache, "abs", -1)[:, 0]
    rows = rows / rows.sum(-1, keepdim=True)
    rollout = an.attention_rollout(cache, queries=-1)
    table = torch.cat([rows, rollout])
    names = [f"layer {i}" for i in range(len(rows))] + ["rollout"]
    return Section(
        "What the last position reads",
        "The last row of every map, |alpha| averaged over channels and made to sum to 1; and the rollout over all"
        " layers, half of it residual stream.",
        plots=[layer_map(table, words, "share of the row", "{:.1%}", names, diverging=False)],
    )


def faithfulness_section(model: Any, cases: list[Case]) -> Section:
    """Correlation of each score with knockout, one layer at a time, and whether both name the same token."""
    agree: dict[str, list[float]] = {name: [] for name in SCORES}
    same: dict[str, list[bool]] = {name: [] for name in SCORES}
    for case in cases:
        _, cache = model.run_with_cache(case.tokens)
        lost = to_last(model, case, 1).abs()
        for name, score in SCORES.items():
            scores = torch.cat([score(cache, i, case) for i in range(model.cfg.n_layers)])
            agree[name] += [correlation(s, k) for s, k in zip(scores, lost, strict=True)]
            same[name] += [int(s.argmax()) == int(k.argmax()) for s, k in zip(scores, lost, strict=True)]
    rows = [
        [name, f"{torch.tensor(agree[name]).nanmedian():+.2f}", f"{sum(same[name])} of {len(same[name])}"]
        for name in SCORES
    ]
    return Section(
        "Does it tell what matters?",
        f"For {len(cases)} prompts and every layer: the scores of all sources for the last position, against how much"
        " the logit difference of two words (the answer and one that another text would have) changes when that source"
        " is cut from the last position in that layer alone. Direct effects are what a source adds to that difference"
        " by this layer, with the final norm frozen.",
        Table(["score", "median correlation", "names the same token"], rows),
    )
