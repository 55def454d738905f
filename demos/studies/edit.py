"""Change one association by a matrix of rank one, at a place that causal tracing found.

ROME (Meng et al. 2022, arXiv:2202.05262) at Mamba's out_proj, as Sharma, Atkinson & Bau 2024 (arXiv:2404.03646) did.

1. Blur a cue's embeddings, restore one mixer's output at a time: where does the answer come back?
2. Solve for the edit of that layer's out_proj that makes the cue lead to another answer and changes ordinary text
   least.
3. See what else changed: other prompts with the cue's word, prompts without it, the loss on ordinary text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from demos.studies.common import Model, Options, percent
from demos.studies.report import Report, Section, Table, layer_map
from demos.tour.measure import summarize
from hooked_mamba import analysis as an


@dataclass(frozen=True)
class Fact:
    """What to change, and what to look at afterwards."""

    prompt: str
    cue: str
    """What is blurred. The edit is made at its last token."""
    old: str
    new: str
    same: tuple[str, ...]
    """Other prompts with the cue's last word, which should follow."""
    others: tuple[str, ...]
    """Prompts about other things, which should stay."""


FACTS = (
    Fact(
        "The Eiffel Tower is in the city of",
        " Eiffel Tower",
        " Paris",
        " Rome",
        ("To see the Eiffel Tower you must travel to", "The Eiffel Tower can be found in"),
        ("The Louvre is in the city of", "The Colosseum is in the city of", "The capital of France is"),
    ),
    Fact(
        "I heard a loud noise. I'm so",
        " heard a loud noise",
        " scared",
        " hungry",
        ("There was a big noise. I'm so", "The noise was loud. I'm so", "Tim heard a noise. He was so"),
        (
            "It is late and the moon is out. I'm so",
            "I lost my ball. I'm so",
            "I like to eat toast for breakfast. I'm so",
        ),
    ),
)
STARTS = ("Once upon a time", "One day, a", "The", "She was", "Tom and")


def run(model: Model, options: Options) -> Report:
    """The whole study."""
    report = Report(
        "edit",
        "One association changed by a rank-one edit",
        "Causal tracing finds where a cue is read; a rank-one change of out_proj"
        " there makes the model answer otherwise.",
        "After Meng et al. 2022, arXiv:2202.05262, and Sharma, Atkinson & Bau 2024, arXiv:2404.03646.",
        f"{model.cfg.model_name}: {summarize(model)}.",
    )
    fact = next((f for f in FACTS if known(model, f)), None)
    if fact is None:
        report.sections.append(
            Section("What it knows", "The model continues none of the study's prompts as expected: nothing to edit.")
        )
        return report
    tokens = model.to_tokens(fact.prompt)
    cue = span(tokens[0].tolist(), model.to_tokens(fact.cue, prepend_bos=False)[0].tolist())
    subject = cue[-1]
    trace = an.causal_trace(model, tokens, fact.old, cue, samples=options.samples, progress=False)
    layer = int(trace.restored[:, subject].argmax())
    report.sections.append(trace_section(model, tokens, fact, subject, trace))

    text = ordinary_text(model, options)
    moment = an.key_moment(model, layer, text)
    edit = an.rank_one_edit(
        model, [tokens], [subject], model.to_single_token(fact.new), layer, moment, steps=options.steps
    )
    edited = edit.apply(model)
    report.sections.append(outcome_section(model, edited, fact))
    report.sections.append(price_section(model, edited, edit, text, layer))
    return report


def known(model: Any, fact: Fact) -> bool:
    """Whether the model says the old answer, and all words are single tokens."""
    if any(len(model.to_tokens(word, prepend_bos=False)[0]) != 1 for word in (fact.old, fact.new)):
        return False
    last = model(fact.prompt)[0, -1, : model.d_vocab_real]
    return int(last.argmax()) == model.to_single_token(fact.old)


def span(tokens: list[int], part: list[int]) -> list[int]:
    """Where a run of tokens first stands in others.

    Raises
    ------
    ValueError
        Nowhere.
    """
    for start in range(len(tokens) - len(part) + 1):
        if tokens[start : start + len(part)] == part:
            return list(range(start, start + len(part)))
    raise ValueError(f"the tokens {part} do not stand in {tokens}")


def ordinary_text(model: Any, options: Options) -> list[Int[Tensor, "b l"]]:
    """What the model writes by itself, a batch for each start."""
    starts = STARTS[: max(1, options.prompts)]
    rows = max(1, options.prompts // len(starts))
    torch.manual_seed(0)
    return [
        model.generate(
            model.to_tokens(start).expand(rows, -1),
            max_new_tokens=32,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
        )
        for start in starts
    ]


def trace_section(model: Any, tokens: Tensor, fact: Fact, subject: int, trace: an.CausalTrace) -> Section:
    """Where the answer comes back."""
    words = model.to_str_tokens(tokens)
    gained = trace.restored - trace.corrupted
    best, pos = divmod(int(trace.restored.argmax()), len(words))
    layer = int(trace.restored[:, subject].argmax())
    return Section(
        "Where is it recalled?",
        f"“{fact.prompt}”: {fact.old.strip()} has {percent(trace.clean)}, and {percent(trace.corrupted)} once"
        f" “{fact.cue.strip()}” is blurred by noise. Each cell restores one mixer's output at one position.",
        plots=[layer_map(gained, words, "probability regained", "{:+.1%}")],
        after=f"Most comes back in layer {best} at {words[pos]!r}: {percent(float(trace.restored[best, pos]))}. At the"
        f" cue's last word, layer {layer} is the strongest ({percent(float(trace.restored[layer, subject]))}); the"
        " edit goes there.",
    )


def outcome_section(model: Any, edited: Any, fact: Fact) -> Section:
    """Probabilities of both answers before and after."""
    groups = [("edited", (fact.prompt,)), ("same cue", fact.same), ("other", fact.others)]
    rows = []
    for group, prompts in groups:
        for prompt in prompts:
            cells = []
            for m in (model, edited):
                last = m(prompt)[0, -1, : m.d_vocab_real].softmax(-1)
                cells += [percent(float(last[m.to_single_token(word)])) for word in (fact.old, fact.new)]
                cells.append(m.to_single_str_token(int(last.argmax())).strip() or "␣")
            rows.append([f"{group}: {prompt}", *cells])
    old, new = fact.old.strip(), fact.new.strip()
    return Section(
        "What changed",
        f"Probabilities of {old} and {new}, and the likeliest word, before and after.",
        Table(["prompt", f"{old} before", f"{new} before", "first", f"{old} after", f"{new} after", "first"], rows),
        after="An edit that generalises moves the second group; one that is specific leaves the third alone.",
    )


def price_section(model: Any, edited: Any, edit: Any, text: list[Tensor], layer: int) -> Section:
    """How large the edit is, and what it does to ordinary text."""
    before, after = (sum(float(m(batch, return_type="loss")) for batch in text) / len(text) for m in (model, edited))
    same = sum(float((model(batch).argmax(-1) == edited(batch).argmax(-1)).double().mean()) for batch in text) / len(
        text
    )
    weight = model.blocks[layer].mixer.out_proj.weight
    return Section(
        "What it cost",
        "On text that the model itself wrote, which the edit was also meant to leave unchanged.",
        Table(
            ["", "before", "after"],
            [
                ["nats per token", f"{before:.4f}", f"{after:.4f}"],
                ["positions with the same likeliest token", "", percent(same)],
                [f"length of out_proj's weights, layer {layer}", f"{float(weight.norm()):.2f}", ""],
                ["length of the edit", "", f"{float(edit.delta.norm()):.2f}"],
                ["nats of the new answer, during the search", f"{edit.losses[0]:.2f}", f"{edit.losses[-1]:.2f}"],
            ],
        ),
    )
