"""Who is it about? Choices between two names, or that a name decides, by activation patching.

The indirect-object task of Wang et al. 2022 (arXiv:2211.00593), as Ensign & Garriga-Alonso 2024 (arXiv:2407.14008)
studied it on Mamba: where does the name stand at every layer, and how does it get from its own position to the last?

1. Measure on all prompts whether the model does the task at all; small models do not, and choose between "he" and
   "she" by a name instead.
2. Take the first task that it does and patch clean activations into the other prompt, layer by position.
3. Replace whole mixers' outputs by those of the other prompt, one at a time, and one at a time not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demos.studies.common import Model, Options, batch, percent, single_tokens
from demos.studies.report import Plot, Report, Section, Table, layer_map
from demos.tour.measure import summarize
from hooked_mamba import ActivationCache, patching

BOYS = ("Tom", "Tim", "Sam", "Ben", "Max", "Jack", "Bob", "John", "Fred")
GIRLS = ("Lily", "Mia", "Sue", "Anna", "Amy", "Lucy", "Sara", "Jane", "Mary", "Kate", "Emma")
OBJECT_TEMPLATES = (
    "Then, {A} and {B} went to the park. {S} gave a ball to",
    "Once upon a time, {A} and {B} were friends. {S} gave a flower to",
    "One day, {A} and {B} were playing. {S} wanted to give a toy to",
)
PRONOUN_TEMPLATES = (
    "Then, {N} went to the park. One day,",
    "Once upon a time, there was a child named {N}. One day,",
    "One day, {N} found a ball and took it to",
)
ENOUGH = 0.9
"""The share of right choices from which a model does a task."""


@dataclass(frozen=True)
class Choices:
    """Prompts in pairs, each the other's corruption: the right answer of one is the wrong one of the other."""

    task: str
    template: str
    clean: Int[Tensor, "b l"]
    corrupted: Int[Tensor, "b l"]
    right: Int[Tensor, " b"]
    wrong: Int[Tensor, " b"]

    def difference(self, logits: Float[Tensor, "b l v"]) -> Float[Tensor, " b"]:
        """Logit of the right answer above that of the wrong one."""
        last = logits[:, -1]
        return (last.gather(1, self.right[:, None]) - last.gather(1, self.wrong[:, None]))[:, 0]


def run(model: Model, options: Options) -> Report:
    """The whole study."""
    report = Report(
        "names",
        "Who is it about? Patching a name",
        "A prompt that a name decides is run with another name, and one activation at a time is put back to what it"
        " was. Where the right answer returns, the name was.",
        "After Ensign & Garriga-Alonso 2024, arXiv:2407.14008, and Wang et al. 2022, arXiv:2211.00593.",
        f"{model.cfg.model_name}: {summarize(model)}.",
    )
    found = [judged(model, choices) for choices in all_choices(model, options.prompts)]
    report.sections.append(accuracy_section(found))
    chosen = next((c for c, right, _ in found if right >= ENOUGH), max(found, key=lambda one: one[1])[0])
    words = [w if same else "(name)" for w, same in labels(model, chosen)]
    _, clean = model.run_with_cache(chosen.clean)
    base, top = (float(chosen.difference(model(t)).mean()) for t in (chosen.corrupted, chosen.clean))

    def restored(logits: Tensor) -> Tensor:
        return (chosen.difference(logits).mean() - base) / (top - base)

    report.sections.append(patching_section(model, chosen, clean, restored, words))
    report.sections.append(mixers_section(model, chosen, restored))
    return report


def all_choices(model: Any, n: int) -> list[Choices]:
    """Every template of both tasks, with n prompts at most."""
    boys, girls = (list(single_tokens(model, names)) for names in (BOYS, GIRLS))
    made = []
    for template in OBJECT_TEMPLATES:
        pairs = list(itertools.permutations((boys + girls)[::2], 2))
        pairs = pairs[:: max(1, len(pairs) // max(1, n // 2))][: max(1, n // 2)]
        texts = [
            (template.format(A=a, B=b, S=s), template.format(A=a, B=b, S=o), o, s)
            for a, b in pairs
            for s, o in ((a, b), (b, a))
        ]
        made.append(choices_of(model, "the other name", template, texts))
    for template in PRONOUN_TEMPLATES:
        pairs = list(zip(boys * 2, girls, strict=False))[: max(1, n // 2)]
        his, hers = ("his", "her") if template.endswith(" to") else ("he", "she")
        texts = [
            t
            for b, g in pairs
            for t in (
                (template.format(N=b), template.format(N=g), his, hers),
                (template.format(N=g), template.format(N=b), hers, his),
            )
        ]
        made.append(choices_of(model, "he or she", template, texts))
    return made


def choices_of(model: Any, task: str, template: str, texts: Sequence[tuple[str, str, str, str]]) -> Choices:
    """Prompts, their corruptions, right and wrong words as tokens."""
    clean, corrupted, right, wrong = zip(*texts, strict=True)
    words = single_tokens(model, {*right, *wrong})
    ids = [torch.tensor([words[w] for w in column], device=model.device) for column in (right, wrong)]
    return Choices(task, template, batch(model, clean), batch(model, corrupted), *ids)


def judged(model: Any, choices: Choices) -> tuple[Choices, float, float]:
    """The share of right choices, and the mean logit difference."""
    difference = choices.difference(model(choices.clean))
    return choices, float((difference > 0).double().mean()), float(difference.mean())


def labels(model: Any, choices: Choices) -> list[tuple[str, bool]]:
    """Each position's token in the first prompt, and whether all prompts share it."""
    same = (choices.clean == choices.clean[0]).all(0).tolist()
    return list(zip(model.to_str_tokens(choices.clean[0]), same, strict=True))


def accuracy_section(found: Sequence[tuple[Choices, float, float]]) -> Section:
    """Which tasks the model does."""
    rows = [
        [f"{c.task}: “{c.template}”", str(len(c.clean)), percent(right), f"{difference:+.2f}"]
        for c, right, difference in found
    ]
    by_task: dict[str, list[float]] = {}
    for choices, right, _ in found:
        by_task.setdefault(choices.task, []).append(right)
    does = [task for task, rights in by_task.items() if max(rights) >= ENOUGH]
    after = (
        f"It does “{'” and “'.join(does)}”"
        + "".join(f", but not “{task}”" for task in by_task if task not in does)
        + ". The first template that it does is patched below."
        if does
        else "It does neither; the better one is patched below, and little should be read into it."
    )
    return Section(
        "Does the model do it?",
        "“The other name” asks who is given something: the name that was not repeated. “He or she” asks whether a name"
        " is taken up by the right pronoun. A choice is right if the right word's logit is above the wrong one's; one"
        " half would be right by chance.",
        Table(["task", "prompts", "right", "mean logit difference"], rows),
        after=after,
    )


def patching_section(
    model: Any, choices: Choices, clean: ActivationCache, restored: Any, words: Sequence[str]
) -> Section:
    """Four sweeps, layer by position."""
    sweeps = {
        "residual stream entering the layer": patching.get_act_patch_resid_pre,
        "the mixer's output": patching.get_act_patch_out_proj,
        "the scan's input, after the convolution": patching.get_act_patch_x,
        "the state after the position": patching.get_act_patch_state,
    }
    plots: list[Plot] = []
    rows = []
    for what, sweep in sweeps.items():
        values = sweep(model, choices.corrupted, clean, restored, progress=False)
        plots.append(layer_map(values, words, f"restored: {what}", "restored {:+.1%}"))
        layer, pos = divmod(int(values.argmax()), values.shape[1])
        rows.append([what, f"layer {layer}", f"{words[pos]!r} ({pos})", percent(float(values.max()))])
    return Section(
        "Where the name is, layer by layer",
        f"“{choices.template}”. A cell is the share of the logit difference that comes back when one activation of the"
        " clean run replaces its counterpart: 0 is the prompt with the other name, 1 the prompt itself. The state goes"
        " on from where it was patched; the other sites change one position.",
        Table(["patched", "strongest in", "at", "restored"], rows),
        plots,
        "What leaves the name's own position in the scan's input goes through the convolution, a step or a few; what"
        " stays in the state waits there to be read.",
    )


def mixers_section(model: Any, choices: Choices, restored: Any) -> Section:
    """Whole mixers, resampled from the other prompt."""
    n = model.cfg.n_layers
    _, other = model.run_with_cache(choices.corrupted)
    sites = [f"blocks.{i}.mixer.hook_out_proj" for i in range(n)]
    rows = []

    def without(chosen: Sequence[str]) -> float:
        hooks = [(site, lambda value, hook: other[hook.name]) for site in chosen]
        return float(restored(model.run_with_hooks(choices.clean, fwd_hooks=hooks)))

    for i in range(n):
        left, alone = without([sites[i]]), without(sites[:i] + sites[i + 1 :])
        rows.append([f"layer {i}", percent(left), percent(alone)])
    return Section(
        "Which mixers carry it",
        "Mixers' outputs, at all positions, taken from the run with the other name: one layer's, or all but one's. What"
        " is left of the logit difference; 100% is the clean run.",
        Table(["mixer", "left without it", "left with it alone"], rows),
    )
