"""The study: which position does each tool name, and how often does the answer stand there?

1. Draw prompts until there are enough that the model answers right; half are for choosing, half for judging.
2. On those for judging, score every position by every tool (`interventions`, `attention`).
3. The position with the highest score is what the tool names; count where it is the answer's.

All positions take part, the question's own too. Seeds of prompts are below 2**32; training's are above.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demos.localisation.attention import attention_scores, choose, rows_of_question
from demos.localisation.interventions import (
    answer_log_probability,
    best_layers,
    knockout_options,
    knockout_scores,
    lead,
    patching_scores,
)
from demos.localisation.stats import Rate
from demos.localisation.task import Task
from hooked_mamba import HookedModel, load_model
from hooked_mamba.analysis.tasks import Prompts

MODELS = Path(__file__).with_name("models")
REQUIRED = 0.95


@dataclass(frozen=True)
class Finding:
    """What one tool named."""

    key: str
    title: str
    meaning: str
    scores: Float[Tensor, "pos b"]
    where: Int[Tensor, " b"]
    """The position that counts as right: the answer's, unless the title says otherwise."""
    offset: int = 0
    """`where` minus the answer's position."""
    required: bool = False
    """Whether the study requires it."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> Int[Tensor, " b"]:
        """The position of the highest score."""
        return self.scores.argmax(0)

    @property
    def rate(self) -> Rate:
        """How often it is the right one."""
        return Rate(int((self.named == self.where).sum()), len(self.where))

    @property
    def offsets(self) -> dict[str, int]:
        """How often it was at which distance from the answer; "question" is the last position where that is wrong."""
        last, counts = self.scores.shape[0] - 1, Counter[str]()
        for at, right in zip(self.named.tolist(), self.where.tolist(), strict=True):
            by = at - right + self.offset
            counts["question" if at == last != right else f"{by:+d}" if by else "answer"] += 1
        return dict(counts.most_common())


@dataclass(frozen=True)
class Study:
    """One task's results."""

    task: Task
    model_name: str
    prompts: Prompts
    """Those for judging."""
    right: Rate
    """Answered right, of all drawn."""
    findings: list[Finding]
    patching: dict[str, Float[Tensor, "layer pos b"]]
    """The whole sweeps, layer by layer."""
    cuts: dict[tuple[int, ...], Float[Tensor, "pos b"]]
    """Token knockout to the question, by the layers that were cut."""

    def __getitem__(self, key: str) -> Finding:
        return next(finding for finding in self.findings if finding.key == key)

    @property
    def passed(self) -> bool:
        """Whether every required tool names the answer often enough."""
        return all(finding.rate.value >= REQUIRED for finding in self.findings if finding.required)


def load(folder: str | Path) -> tuple[HookedModel, Task]:
    """A model that `demos.localisation.train` made, by folder or as "recall" or "induction", and its task."""
    known = MODELS / str(folder)
    folder = known if known.is_dir() else Path(folder)
    task = Task.load(folder)
    return load_model(folder), task


@torch.no_grad()
def correct_prompts(model: HookedModel, task: Task, n: int, seed: int) -> tuple[Prompts, Rate]:
    """The first n prompts that the model answers right, and the share of right ones among all drawn.

    Raises
    ------
    ValueError
        If fewer than half of them are right: such a model does not do the task.
    """
    drawn = task.prompts(2 * n, seed)
    right = model(drawn.tokens)[:, -1].argmax(-1) == drawn.answers
    if int(right.sum()) < n:
        raise ValueError(f"the model answers {int(right.sum())} of {2 * n} prompts: train it until it does the task")
    return drawn.rows(right.nonzero()[:n, 0]), Rate(int(right.sum()), 2 * n)


@torch.no_grad()
def study(model: HookedModel, task: Task, n: int = 256, seed: int = 0, progress: bool = True) -> Study:
    """Judge all tools on n prompts that the model answers right.

    Parameters
    ----------
    n
        Prompts for judging; as many others are for choosing layers and channels.
    seed
        Of the prompts.
    """
    both, right = correct_prompts(model, task, 2 * n, seed)
    judged, others = both.rows(torch.arange(n)), both.rows(torch.arange(n, 2 * n))
    shuffled, renamed = task.shuffled(judged, seed), task.renamed(judged, seed)
    replaced = task.replaced(judged, seed)
    answer = answer_log_probability(judged)
    sweeps = {
        "shuffled": patching_scores(model, judged, shuffled, answer, progress),
        "renamed": patching_scores(model, judged, renamed, answer, progress),
        "renamed_lead": patching_scores(model, judged, renamed, lead(judged, renamed), progress),
        "replaced": patching_scores(model, judged, replaced, lead(judged, replaced), progress),
    }
    where, n_layers = judged.where, model.cfg.n_layers
    layers, there = best_layers(knockout_options(model, others, progress=progress), others.where)
    cuts = knockout_options(model, judged, progress=progress)
    chosen = {"layers": list(layers), "rate_where_chosen": there.value}
    findings = [
        Finding(
            "patch_shuffled",
            "activation patching, tokens in another order",
            "The clean residual stream entering layer 0, position by position, into a run with the same tokens in"
            " another order (keys, or the token asked for, stay), scored by log P(clean answer). The answer's token is"
            " in that run too, at another place.",
            sweeps["shuffled"][0],
            where,
            required=True,
        ),
        Finding(
            "patch_renamed",
            "activation patching, every token another",
            "The same into a run of the same layout without one token in common: which position makes the model say"
            " the clean answer?",
            sweeps["renamed"][0],
            where,
            required=True,
        ),
        Finding(
            "patch_renamed_lead",
            "activation patching, the same by logit difference",
            "logit(clean answer) - logit(other answer) also rises where a patch only takes the other answer away, as a"
            " patch of the key or the question does.",
            sweeps["renamed_lead"][0],
            where,
        ),
        Finding(
            "patch_replaced",
            "activation patching, only the answer another",
            "Into a run that differs in the answer's token alone, scored by the logit difference. Before any mixing it"
            " can point nowhere else: a check of the machinery, not a discovery.",
            sweeps["replaced"][0],
            where,
            required=True,
        ),
        Finding(
            "knockout_token",
            "token knockout, layers chosen",
            "What a token's values send through all taps of the convolution to the last position, cut in one layer or"
            " in all: whichever names the answer most often on other prompts.",
            cuts[layers],
            where,
            required=True,
            details=chosen,
        ),
        Finding(
            "knockout_token_layers",
            "token knockout, in all layers",
            "The same without choosing layers.",
            cuts[tuple(range(n_layers))],
            where,
        ),
        Finding(
            "knockout_token_all",
            "token knockout, in all layers, to all positions",
            "Routes over a third position are cut too.",
            knockout_scores(model, judged, "token", n_layers, to_all=True, progress=progress)[0],
            where,
        ),
        Finding(
            "knockout_scan",
            "scan knockout, in the same layers",
            "The scan's own terms alpha[t,s] u_s. u_s mixes the tokens s-K+1 to s.",
            knockout_options(model, judged, "scan", progress=progress)[layers],
            where,
            details={"layers": list(layers)},
        ),
    ]
    findings += attention_findings(model, judged, others)
    return Study(task, model.cfg.model_name, judged, right, findings, sweeps, cuts)


def attention_findings(model: HookedModel, judged: Prompts, others: Prompts) -> list[Finding]:
    """Hidden attention's own rates: at the answer, at the position whose u holds it, and carried back to tokens."""
    found = []
    rows = {by: (rows_of_question(model, others, by), rows_of_question(model, judged, by)) for by in (False, True)}

    def finding(key: str, title: str, meaning: str, by_token: bool, offset: int) -> Finding:
        choosing, judging = rows[by_token]
        choice = choose(choosing, others.where + offset)
        details = {"layers": [choice.layer], "channels": choice.channels, "rate_where_chosen": choice.rate.value}
        return Finding(
            key, title, meaning, attention_scores(judging, choice), judged.where + offset, offset, details=details
        )

    text = "The largest mean |alpha[t,s]| of the question's row"
    found.append(finding("attention", "hidden attention", text + ".", False, 0))
    reach = range(1, model.cfg.d_conv)
    offset = max(reach, key=lambda k: choose(rows[False][0], others.where + k).rate.hits)
    places = f"{offset} position{'s' * (offset > 1)} after the answer"
    title = f"hidden attention, right where it names {places}"
    meaning = f"{text}; that far behind, the convolution has mixed the answer into u. Chosen among 1 to {reach[-1]}."
    found.append(finding(f"attention_plus{offset}", title, meaning, False, offset))
    meaning = "Each channel's row carried back through the taps of the convolution to the tokens."
    found.append(finding("attention_token", "hidden attention, carried back to tokens", meaning, True, 0))
    return found
