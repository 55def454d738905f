"""The study as a report: tables for the screen, heat maps for the page."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch

from demos.localisation.stats import Rate
from demos.recurrences import measure, tracing
from demos.recurrences.measure import DISTANCES, PAIR_COUNTS, WAITS
from demos.recurrences.subjects import KEYS, PAIRS, VALUES, Subject
from demos.recurrences.tracing import Traced
from demos.studies.report import Plot, Report, Section, Table
from demos.tour.charts import heat_map
from hooked_mamba.frozen.delta import DeltaScan

Traces = tuple[Traced, Traced, Traced]
"""Of recall: the trained model and the same before training; of induction: the trained one."""


def report_of(compared: Sequence[Subject], n: int, seed: int) -> Report:
    """The whole study.

    Parameters
    ----------
    compared
        The recurrences.
    n
        Prompts of each kind.
    seed
        Of the prompts.
    """
    first = compared[0]
    traces = [(*tracing.traced_recall(one, n, seed), tracing.traced_induction(one, n, seed)) for one in compared]
    return Report(
        "recurrences",
        "Which recurrence keeps what, and how long?",
        "Five recurrences, each trained on associative recall until it succeeded (350 to 2,000 steps, see their cards):"
        " pairs of a key and a value, then a key; which value followed it? Equal width, two layers,"
        " states of equal size: they differ in what a state forgets, and how it makes room.",
        "Tools: what is left of a write, attribution to tokens, exact erasure. Trained by demos.localisation.train.",
        f"Models in demos/localisation/models; {first.state_numbers:,} numbers in each layer's state.",
        [
            models_section(compared, n, seed),
            capacity_section(compared, n, seed),
            duration_section(compared, n, seed),
            survival_section(compared, n, seed),
            rewriting_section(compared, n, seed),
            tracing_section(compared, traces),
            readings_section(compared, traces),
            default_section(compared, n, seed),
            removal_section(compared, n, seed),
        ],
    )


def models_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """Sizes, and whether they do the task."""
    rows = []
    for one in compared:
        prompts = measure.recall(n, PAIRS, seed)
        rate = measure.accuracy(one.model, prompts.tokens, prompts.answers)
        chance = measure.accuracy(one.untrained, prompts.tokens, prompts.answers)
        size = sum(p.numel() for p in one.model.parameters())
        rows.append([one.title, f"{size:,}", f"{one.state_numbers:,}", str(rate), str(chance)])
    return Section(
        "The models",
        f"Right answers to {n} questions about {PAIRS} pairs, with Wilson's 95% interval; the control is the same model"
        " before training. RWKV-7 and gated DeltaNet have an MLP in each block, as they are published.",
        Table(["recurrence", "parameters", "numbers of a layer's state", "right", "before training"], rows),
    )


def capacity_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """Right answers by pairs."""
    rates = [measure.capacity(one, n, seed) for one in compared]
    return Section(
        "How much?",
        f"More pairs than the {PAIRS} of training (of Mamba-3: 6). There are 16 keys: with 16 pairs all of them are"
        " bound at once. By chance, some value of the prompt is right once in as many questions as there are pairs.",
        plots=[_rates(compared, rates, [str(count) for count in PAIR_COUNTS], "pairs")],
        after=_ends(compared, rates, f"{PAIR_COUNTS[-1]} pairs"),
    )


def duration_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """Right answers by questions that come first."""
    rates = [measure.duration(one, n, seed) for one in compared]
    return Section(
        "How long?",
        f"{PAIRS} pairs, then questions about seven of them with their right answers, at last the one that was never"
        " asked for. In training up to seven questions came first.",
        plots=[_rates(compared, rates, [str(wait) for wait in WAITS], "questions before")],
        after=_ends(compared, rates, f"{WAITS[-1]} questions"),
    )


def survival_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """What is left of writes."""
    few = max(2, n // 8)
    found = [[measure.survival(m, few, seed) for m in (one.model, one.untrained)] for one in compared]
    rows, names = [], []
    for one, (trained, untrained) in zip(compared, found, strict=True):
        for layer in range(len(trained)):
            rows.append(trained[layer])
            names.append(f"{one.title}, layer {layer}")
        rows.append(untrained.mean(0))
        names.append(f"{one.title}, untrained")
    values = torch.stack(rows)
    hover = [
        [f"{name}, after {by} positions: {value:.1%} left" for by, value in zip(DISTANCES, row, strict=True)]
        for name, row in zip(names, values.tolist(), strict=True)
    ]
    text = [[f"{100 * value:.0f}" for value in row] for row in values.tolist()]
    columns = [str(by) for by in DISTANCES]
    figure = heat_map(
        values, columns, hover, "share of a write that is left, by positions after (cells: percent)", names, text=text
    )
    return Section(
        "What is left of a write",
        "The share of a value's write that is still in the state after so many positions, whatever reads it: the"
        " product of decays in Mamba, in RWKV-7 and gated DeltaNet the length that removals and decays have left of its"
        " key."
        f" Mean over {few} prompts, their eight values and all channels or heads.",
        plots=[_shares(figure)],
        after="A mean hides that channels and heads differ: some are made to forget within a few tokens. The untrained"
        " rows are the mean of both layers.",
    )


def rewriting_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """Keys that come twice."""
    rows = []
    for one in compared:
        said = measure.which_value(one, n, seed)
        rows.append([one.title, *(str(said[what]) for what in ("new", "old", "other"))])
    return Section(
        "A key that comes again",
        "One key comes a second time, with another value; then it is asked for. No training sequence had two values for"
        " one key: what a recurrence does by itself when it writes over what is there. By chance, a value of the prompt"
        f" is the new one, or the old one, in {1 / PAIRS:.1%} each.",
        Table(["recurrence", "the new value", "the old value", "another"], rows),
    )


def tracing_section(compared: Sequence[Subject], traces: Sequence[Traces]) -> Section:
    """Attribution's source."""
    rows = []
    for one, (trained, control, induction) in zip(compared, traces, strict=True):
        rates = (trained.token.answer, trained.token.before, control.token.answer, induction.token.answer)
        rows.append([one.title, *map(str, rates)])
    columns = ["recall: the answer's position", "the one before it, its key's", "control", "induction: the answer's"]
    return Section(
        "Where the answer comes from",
        "The lead of the answer's logit over the mean of all values, as a sum over the tokens' embeddings with"
        " selection, gates and norms held: how often the largest part is that of the answer's own position, in prompts"
        " that are answered right. The control is the model before training, on the same prompts; drawn at random, a"
        f" position would be it in {1 / (2 * PAIRS + 1):.1%}. The last column is of models trained on induction: what"
        " followed this token the last time?",
        Table(["recurrence", *columns], rows),
        after="Where a convolution has put a key and its value into one number, the sum shares that number out between"
        " the two by its taps, with SiLU's factor held.",
    )


def readings_section(compared: Sequence[Subject], traces: Sequence[Traces]) -> Section:
    """Two other readings of the same sum."""
    rows = []
    for one, (trained, control, induction) in zip(compared, traces, strict=True):
        rates = (trained.beyond.answer, trained.write.answer, trained.write.question)
        rows.append([one.title, *map(str, (*rates, control.write.answer, induction.write.answer))])
    columns = ["beyond the average prompt: the answer's", "largest write: the answer's", "the question's", "control"]
    return Section(
        "Two other readings of it",
        "The table above counts all of an embedding, also what any other token would add at its place. Beyond the"
        " average prompt: only what each embedding has beyond the mean of all prompts at its position. Largest write:"
        " of the values that enter some layer's memory, of all layers and positions, the one with the largest part;"
        " what a convolution spreads counts where it enters, and a write of layer 1 holds what layer 0 has put at its"
        " position. The last two columns are of the largest write.",
        Table(["recurrence", *columns, "induction: the answer's"], rows),
        after="Where the traced token is the key and the largest write the answer's, the first layer has bound the two"
        " at the answer's position, and the last layer recalls what was bound.",
    )


def default_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """What is said without the answer."""
    rows = []
    for one in compared:
        found = tracing.default(one, n, seed)
        rates = [str(rate) if rate.n else "none" for rate in (found.said, found.kept, found.answer)]
        rows.append([one.title, f"value {found.token - KEYS}", *rates])
    columns = ["said most", "how often", "traced to the answer where this is it", "where another is it"]
    return Section(
        "Without the answer",
        "The answer's embedding replaced by the mean of all values': what is said now? A model that falls back to one"
        " value need not read it where it is right: the question itself says it, and the other values take it back."
        f" Each value is the answer in about {1 / VALUES:.1%} of prompts.",
        Table(["recurrence", *columns], rows),
    )


def removal_section(compared: Sequence[Subject], n: int, seed: int) -> Section:
    """Single removals switched off."""
    rows = []
    for one in compared:
        if not isinstance(measure.Run(one.model, measure.recall(1, 2).tokens).chain(0).scan, DeltaScan):
            continue
        for layer in range(one.model.cfg.n_layers):
            found = measure.removal(one, layer, n, seed)
            numbers = (found.lead, found.without, found.direct, found.elsewhere)
            cells = [f"{number:+.2f}" for number in numbers]
            rows.append([f"{one.title}, layer {layer}", *cells, f"{measure.erasure_error(one, layer, seed):.0e}"])
    columns = ["recurrence", "lead", "lead without it", "direct part, exact", "the same elsewhere"]
    return Section(
        "What a removal does",
        "The same prompts, and the lead of the new value's logit over the old one's. These recurrences remove what is"
        " stored under a key from the state before they write. Without it: the lead of the real model when one layer"
        " recalls nothing at the new value's position. The direct part is what its direct effect on the lead changes"
        " by when that removal alone is switched off, by one forward scan and one reverse scan (erasure); elsewhere: on"
        " average at the other positions, the control. The last column compares all single effects of one prompt with"
        " doing each, in float64.",
        Table([*columns, "largest relative difference from doing each"], rows),
    )


def _rates(compared: Sequence[Subject], rates: list[list[Rate]], columns: list[str], unit: str) -> Plot:
    values = torch.tensor([[rate.value for rate in row] for row in rates])
    hover = [
        [f"{one.title}, {column} {unit}: {rate}" for column, rate in zip(columns, row, strict=True)]
        for one, row in zip(compared, rates, strict=True)
    ]
    text = [[f"{100 * rate.value:.0f}" for rate in row] for row in rates]
    names = [one.title for one in compared]
    figure = heat_map(values, columns, hover, f"share right, by {unit} (cells: percent)", names, text=text)
    return _shares(figure)


def _shares(figure: go.Figure) -> Plot:
    """A map of shares, whose colours go from 0 to 1."""
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1})
    return Plot(figure.update_xaxes(tickangle=0), "sequential")


def _ends(compared: Sequence[Subject], rates: list[list[Rate]], what: str) -> str:
    found = ", ".join(f"{one.title} {row[-1]}" for one, row in zip(compared, rates, strict=True))
    return f"At {what}: {found}."
