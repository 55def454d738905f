"""Induction through the short convolution: what followed this token the last time?

Arora et al. 2025 (arXiv:2505.15105): where a transformer needs two layers, one to move each token one position on and
one to look it up, Mamba's short convolution does the first step, and the scan looks up what it bound together.

1. A model trained on induction where there is one (`demos.localisation`); else whether a story's thing comes again.
2. Take taps of the convolution away, one at a time, layer by layer; and each layer's memory, by A_bar = 0.
3. Cut scan terms by position, around the answer: which one is read, and what had the taps put together there?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demos.localisation.study import MODELS
from demos.localisation.task import FILE, Task
from demos.studies.common import Model, Options, batch, percent, single_tokens
from demos.studies.report import Report, Section, Table, layer_map
from demos.tour.measure import summarize
from hooked_mamba import analysis as an
from hooked_mamba.analysis.tasks import Prompts

TEMPLATE = "Once upon a time, Tim had a {O}. Tim loved to play with his"
THINGS = ("doll", "ball", "car", "book", "toy", "cat", "dog", "hat", "flower", "apple", "cake", "bird", "boat", "train")


@dataclass(frozen=True)
class Questions:
    """Prompts whose answer stood in them, and when a model is right."""

    prompts: Prompts
    what: str
    right: Callable[[Float[Tensor, "b l v"]], Bool[Tensor, " b"]]
    chance: float

    def accuracy(self, model: Any) -> float:
        """The share of right answers."""
        return float(self.right(model(self.prompts.tokens)).double().mean())


def default_model() -> str:
    """The model trained on induction, where it is there."""
    trained = MODELS / "induction"
    return str(trained) if (trained / FILE).is_file() else "tinystories-4l"


def run(model: Model, options: Options) -> Report:
    """The whole study."""
    questions = questions_for(model, options)
    report = Report(
        "induction",
        "Induction through the short convolution",
        "What followed this token the last time it occurred? To answer, a token must be stored together with the one"
        " before it. Which part does this: the convolution, which mixes neighbours, or the state?",
        "After Arora et al. 2025, arXiv:2505.15105.",
        f"{model.cfg.model_name}: {summarize(model)}.",
    )
    before = questions.accuracy(model)
    report.sections += [
        parts_section(model, questions, before),
        taps_section(model, questions, before),
        positions_section(model, questions, before),
    ]
    return report


def questions_for(model: Any, options: Options) -> Questions:
    """The task that the model was trained on, or things of a story that come again."""
    folder = Path(options.model)
    if (folder / FILE).is_file():
        task = Task.load(folder)
        prompts = task.prompts(8 * options.prompts, 0)
        what = f"{len(prompts)} prompts of {task.length} tokens ({task.name}), each with one question, the last token."
        return Questions(
            prompts, what, lambda logits: logits[:, -1].argmax(-1) == prompts.answers, 1 / (task.length - 1)
        )
    things = single_tokens(model, THINGS)
    tokens = batch(model, (TEMPLATE.format(O=thing) for thing in things))
    answers = torch.tensor(list(things.values()))
    where = (tokens == answers[:, None]).int().argmax(1)

    def right(logits: Tensor) -> Tensor:
        """Whether the thing gains more by having been named than any other thing does."""
        named = logits[:, -1][:, answers]
        return (named - named.mean(0)).argmax(1) == torch.arange(len(answers))

    what = (
        f"“{TEMPLATE}” with {len(things)} things. A model of stories has its favourites, so right means that no other"
        " thing gains as much over its mean in all these prompts."
    )
    return Questions(Prompts(tokens, answers, where), what, right, 1 / len(things))


# Interventions -----------------------------------------------------------------------------------------------------


@contextmanager
def without_taps(model: Any, layer: int, taps: Sequence[int]) -> Iterator[None]:
    """A layer's convolution without what stood k positions before, for each k in `taps`."""
    weight = model.blocks[layer].mixer.conv1d.weight
    columns = [weight.shape[-1] - 1 - k for k in taps]
    kept = weight[..., columns].clone()
    try:
        weight[..., columns] = 0
        yield
    finally:
        weight[..., columns] = kept


@contextmanager
def without_memory(model: Any, layer: int) -> Iterator[None]:
    """A layer whose state forgets everything at every step: it reads what is written at the same position alone."""
    with model.hooks([(f"blocks.{layer}.mixer.hook_A_bar", lambda value, hook: torch.zeros_like(value))]):
        yield


def parts_section(model: Any, questions: Questions, before: float) -> Section:
    """Convolution or memory, layer by layer."""
    K = model.blocks[0].mixer.conv1d.weight.shape[-1]
    rows = []
    for i in range(model.cfg.n_layers):
        with without_taps(model, i, range(1, K)):
            no_conv = questions.accuracy(model)
        with without_memory(model, i):
            no_memory = questions.accuracy(model)
        rows.append([f"layer {i}", percent(no_conv), percent(no_memory)])
    return Section(
        "Convolution or memory?",
        f"{questions.what} Whole, the model is right in {percent(before)}; by chance it would be in"
        f" {percent(questions.chance)}. Without a convolution, a layer's taps see the position itself alone; without"
        " memory, its states forget everything from one position to the next.",
        Table(["what is left of", "right without its convolution", "right without its memory"], rows),
    )


def taps_section(model: Any, questions: Questions, before: float) -> Section:
    """Each tap of each layer alone."""
    K = model.blocks[0].mixer.conv1d.weight.shape[-1]
    values = torch.zeros(model.cfg.n_layers, K)
    for i in range(model.cfg.n_layers):
        for k in range(K):
            with without_taps(model, i, [k]):
                values[i, k] = questions.accuracy(model) - before
    columns = ["t", *(f"t-{k}" for k in range(1, K))]
    layer, k = divmod(int(values[:, 1:].argmin()), K - 1)
    return Section(
        "Which tap?",
        "One tap of one layer's convolution set to zero, in all channels: what stood 0, 1, 2, ... positions before t.",
        plots=[layer_map(values, columns, "change of the share of right answers", "{:+.1%}")],
        after=f"Among those that look back, layer {layer}'s t-{k + 1} costs most:"
        f" {percent(-float(values[layer, k + 1]))} of all prompts.",
    )


def positions_section(model: Any, questions: Questions, before: float) -> Section:
    """Scan terms cut from the last position, layer by layer."""
    prompts = questions.prompts
    places: dict[str, Int[Tensor, " b"]] = {
        "the token before the answer": prompts.where - 1,
        "the answer": prompts.where,
        "one after the answer": prompts.where + 1,
        "two after the answer": prompts.where + 2,
    }
    last = prompts.tokens.shape[1] - 1
    rows = []
    for name, at in places.items():
        mask = torch.zeros_like(prompts.tokens, dtype=torch.bool)
        mask[torch.arange(len(at)), at.clamp(0, last)] = (at >= 0) & (at < last)
        cells = [name]
        for i in [*range(model.cfg.n_layers), None]:
            with an.knockout(model, mask, -1, i, source="scan"):
                cells.append(percent(questions.accuracy(model)))
        rows.append(cells)
    return Section(
        "Where is it looked up?",
        "The scan's term at one position cut from the last one: the share of right answers that is left. Where the"
        " convolution's taps have put the answer and the token before it together, one term holds both, and the scan"
        " has nothing left to bind: at the answer if they look back by 0 and 1, one after it if by 1 and 2.",
        Table(["cut at", *(f"layer {i}" for i in range(model.cfg.n_layers)), "all layers"], rows),
        after=f"Without a cut {percent(before)} are right.",
    )
