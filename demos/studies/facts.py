"""Where is a fact of the text read? Knockout of the flow from one token to the last position.

After Sharma, Atkinson & Bau 2024 (arXiv:2404.03646) and Mamba Knockout (arXiv:2505.24244): cut in a window of layers
what one token sends to the last position, by values alone, and see whether the answer goes.

1. Keep the prompts that the model continues as expected; what it says is the answer.
2. Cut every token's flow to the last position, and to all later ones, in all layers and in windows of them.
3. Cut the token that matters most in other ways: the scan's own term, and the write into the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demos.studies.common import Model, Options, percent
from demos.studies.report import Report, Section, Table, layer_map
from demos.tour.measure import summarize
from hooked_mamba import analysis as an

PROMPTS = (
    # In the text itself, for small story models.
    ("I like to eat toast for breakfast. I'm so", " hungry", " scared", "toast"),
    ("I want some bread. I'm so", " hungry", " scared", "bread"),
    ("Mom made soup for dinner. I'm so", " hungry", " scared", "soup"),
    ("I heard a loud noise. I'm so", " scared", " hungry", "noise"),
    ("It is late and the moon is out. I'm so", " scared", " hungry", "moon"),
    ("Once upon a time, Tim had a red ball. Tim loved his red", " ball", " doll", "ball"),
    ("Lily was sad because she lost her doll. She looked for her", " doll", " ball", "doll"),
    # In the weights, for models that have read the world.
    ("The Eiffel Tower is in the city of", " Paris", " Rome", "Tower"),
    ("The Colosseum is in the city of", " Rome", " Paris", "Colosseum"),
    ("Barack Obama was born in the state of", " Hawaii", " Texas", "Obama"),
    ("The capital of Japan is the city of", " Tokyo", " Paris", "Japan"),
    ("Microsoft was founded by Paul Allen and Bill", " Gates", " Clinton", "Microsoft"),
)
"""Prompt, its expected continuation, one that another text would have, and the word that decides it (for the reader;
the tools are not told)."""


SHOWN = 3
"""Prompts with maps."""


@dataclass(frozen=True)
class Case:
    """A prompt that the model continues as expected."""

    prompt: str
    tokens: Int[Tensor, "1 l"]
    words: list[str]
    answer: int
    other: int
    cause: str
    probability: float

    def difference(self, logits: Float[Tensor, "b l v"]) -> Float[Tensor, ""]:
        """Logit of the answer above the other's: what would suit any text, such as an adjective, drops out."""
        return (logits[:, -1, self.answer] - logits[:, -1, self.other]).mean()


def run(model: Model, options: Options) -> Report:
    """The whole study."""
    cases = known(model, options.prompts)
    report = Report(
        "facts",
        "Where is it read? Knockout of the flow between tokens",
        "The values that a token sends to others are cut, in some layers, while step sizes, B, C and gates stay what"
        " they are. If the answer disappears, it came from that token and was read there.",
        "After Sharma, Atkinson & Bau 2024, arXiv:2404.03646, and Mamba Knockout, arXiv:2505.24244.",
        f"{model.cfg.model_name}: {summarize(model)}.",
    )
    report.sections.append(known_section(model, cases, len(PROMPTS)))
    if cases:
        window = max(1, min(4, model.cfg.n_layers // 2))
        report.sections += [tokens_section(model, cases), windows_section(model, cases, window)]
        report.sections.append(ways_section(model, cases))
    return report


def known(model: Any, n: int) -> list[Case]:
    """The prompts, n at most, after which the expected word is the likeliest."""
    found = []
    for prompt, expected, other, cause in PROMPTS:
        ids = [model.to_tokens(word, prepend_bos=False)[0].tolist() for word in (expected, other)]
        tokens = model.to_tokens(prompt)
        last = model(tokens)[0, -1, : model.d_vocab_real]
        if all(len(one) == 1 for one in ids) and int(last.argmax()) == ids[0][0] and len(found) < n:
            words = model.to_str_tokens(tokens)
            found.append(Case(prompt, tokens, words, ids[0][0], ids[1][0], cause, float(last.softmax(-1)[ids[0][0]])))
    return found


def to_last(model: Any, case: Case, window: int) -> Float[Tensor, "window token"]:
    """Change of the logit difference when the last position does not see a token's values, in a window of layers."""
    return an.knockout_sweep(
        model, case.tokens, case.difference, -1, "token", window, progress=False
    ) - case.difference(model(case.tokens))


def to_all_later(model: Any, case: Case, layers: Sequence[int] | None = None) -> Float[Tensor, " token"]:
    """Change when no later position sees a token's values, in some layers (None: all): one row per token."""
    l = len(case.words)
    mine = torch.eye(l, dtype=torch.bool)
    rows = case.tokens.expand(l, -1)
    with an.knockout(model, mine, mine.cumsum(1).bool() & ~mine, layers):
        logits = model(rows)
    changed = torch.stack([case.difference(one) for one in logits.split(1)])
    return changed - case.difference(model(case.tokens))


def known_section(model: Any, cases: list[Case], tried: int) -> Section:
    """What the model knows."""
    rows = [
        [
            case.prompt,
            model.to_single_str_token(case.answer).strip(),
            percent(case.probability),
            model.to_single_str_token(case.other).strip(),
            f"{float(case.difference(model(case.tokens))):+.2f}",
        ]
        for case in cases
    ]
    return Section(
        "What it knows",
        f"Of {tried} prompts, {len(cases)} are continued as expected; only these are cut. The others are beyond this"
        " model, and say nothing about where it reads. What is followed is the answer's logit above that of a word that"
        " would stand in its place after another text.",
        Table(["prompt", "answer", "probability", "other", "logit difference"], rows) if rows else None,
    )


def tokens_section(model: Any, cases: list[Case]) -> Section:
    """Each token cut in all layers: from the last position alone, and from all later ones."""
    rows, right = [], 0
    for case in cases:
        cells = [case.prompt]
        for changed in (to_last(model, case, model.cfg.n_layers)[0], to_all_later(model, case)):
            t = int(changed[:-1].argmin())
            cells += [f"{case.words[t]!r}", f"{changed[t]:+.2f}"]
        right += case.cause in case.words[t]
        rows.append(cells)
    return Section(
        "Cut in every layer",
        "The token whose cut takes most off the logit difference: its values kept from the last position alone, and"
        " from all later positions.",
        Table(["prompt", "most by, to the last", "change", "most by, to all later", "change"], rows),
        after=f"Cut from all later positions, the word that a reader would name is first in {right} of {len(cases)}."
        " Where the last position loses more by another token, the content had been passed on to that one in a lower"
        " layer.",
    )


def windows_section(model: Any, cases: list[Case], window: int) -> Section:
    """Windows of layers, two maps a prompt."""
    starts = range(model.cfg.n_layers - window + 1)
    names = [f"layers {i} to {i + window - 1}" if window > 1 else f"layer {i}" for i in starts]
    plots, rows = [], []
    for case in cases:
        later = torch.stack([to_all_later(model, case, range(i, i + window)) for i in starts])
        most = later[:, :-1].argmin(1).tolist()
        rows.append([case.prompt, *(f"{case.words[t]!r} {later[i, t]:+.2f}" for i, t in enumerate(most))])
        if len(rows) <= SHOWN:
            for values, where in ((to_last(model, case, window), "the last position"), (later, "all later ones")):
                plots.append(layer_map(values, case.words, f"cut from {where}: change, logits", "{:+.3f}", names))
    return Section(
        "By layers",
        f"The same cuts in {window} layer{'s' if window > 1 else ''} at a time; maps of the first prompts. Orange: the"
        " answer loses. Blue: it gains, since the token spoke against it. The table has the token whose cut from all"
        " later positions takes most, window by window.",
        Table(["prompt", *names], rows),
        plots,
    )


def ways_section(model: Any, cases: list[Case]) -> Section:
    """One token, cut in other ways."""
    rows = []
    for case in cases:
        t = int(to_all_later(model, case)[:-1].argmin())
        before = float(case.difference(model(case.tokens)))
        later = range(t + 1, len(case.words))
        cells = [f"{case.words[t]!r} of “{case.prompt}”"]
        for source, cut, targets in (
            ("token", "read", later),
            ("scan", "read", later),
            ("token", "write", None),
            ("token", "read", -1),
        ):
            with an.knockout(model, t, targets, None, source, cut):  # type: ignore[arg-type]
                cells.append(f"{float(case.difference(model(case.tokens))) - before:+.2f}")
        rows.append(cells)
    return Section(
        "Four ways to cut a token",
        "Change of the logit difference, all layers, for the token that matters most. Token: what it sends to all later"
        " positions through all taps of the convolution. Scan: only the scan's term at its own position, so that what"
        " the convolution took to its neighbours remains. Never written: its value is kept out of every state, while"
        " the skip D past the state remains. Last: as the first, but kept from the last position only.",
        Table(["token", "token", "scan", "never written", "last"], rows),
    )
