"""What carries the language to characters that any language could have: patching, by layer and position."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from demos.stranger.model import HookedStranger, tokens_of
from demos.stranger.task import class_ids
from demos.stranger.text import LANGUAGES, documents
from demos.studies.report import Section, Table, layer_map
from hooked_mamba.analysis.patch_runs import Patch, run_patches

SHARED = ("\ncount, total, name\n", "\nuser price 12\n", "\n(item, city)\n", "\ndate = 31\n")
"""Lines that stand in all languages' documents."""

SIDE = 48
"""Characters of a language before and after the shared line."""

WINDOW = 4
"""Characters that one patch of the map takes."""


def around(language: int, line: str, seed: int) -> str:
    """A line with text of one language on both sides."""
    before, after = (documents(1, SIDE, 2 * seed + side, language)[0].text for side in (0, 1))
    return before + line + after


class Pair:
    """Two texts that differ in all but a line, and how much of the first one's reading of that line is restored."""

    def __init__(self, model: HookedStranger, labels: list[str], clean: str, corrupted: str, ids: tuple[int, int]):
        self.model, self.length = model, len(clean)
        self.classes = class_ids(labels)[list(ids)]
        self.tokens = tokens_of(corrupted)
        self.shared = slice(SIDE, len(clean) - SIDE)
        logits, self.cache = model.run_with_cache(tokens_of(clean), names_filter="blocks.*.hook_resid_pre")
        self.high, self.low = self.lead(logits), self.lead(model(self.tokens))

    def lead(self, logits: Float[Tensor, "1 l V"]) -> float:
        """The clean language's logit less the other's, a mean over the shared line."""
        first, second = logits[0, self.shared][:, self.classes].mean(0).tolist()
        return first - second

    def restored(self, places: list[tuple[int, slice]], donor: Pair | None = None) -> Tensor:
        """Shares after patches of the stream entering a layer at some positions: 0 as corrupted, 1 as clean."""
        cache = (donor or self).cache

        def patch(layer: int, at: slice) -> Patch:
            site = f"blocks.{layer}.hook_resid_pre"

            def edit(value: Tensor) -> Tensor:
                value[:, at] = cache[site][:, at]
                return value

            return Patch(site, edit)

        leads = run_patches(
            self.model,
            self.tokens,
            [patch(layer, at) for layer, at in places],
            lambda logits: torch.tensor(self.lead(logits)),
            progress=False,
        )
        return (leads - self.low) / (self.high - self.low)


def pairs(model: HookedStranger, labels: list[str], lines: int) -> Iterator[tuple[Pair, Pair]]:
    """Every ordered pair of languages around each line, and with it the control: a donor of the corrupted language."""
    for k, line in enumerate(SHARED[:lines]):
        for ids in permutations(range(3), 2):
            texts = [around(ids[0], line, k), around(ids[1], line, k), around(ids[1], line, k + 100)]
            yield Pair(model, labels, texts[0], texts[1], ids), Pair(model, labels, texts[2], texts[1], ids)


def patching_section(model: HookedStranger, labels: list[str], lines: int) -> Section:
    """A map of one pair, and a table of all."""
    n = model.cfg.n_layers
    found: list[Tensor] = []
    controls: list[Tensor] = []
    changed = 0.0
    for pair, donor in pairs(model, labels, lines):
        parts = (slice(0, SIDE), pair.shared, slice(pair.length - SIDE, pair.length))
        places = [(layer, at) for layer in range(n) for at in parts]
        found.append(pair.restored(places).reshape(n, 3))
        controls.append(pair.restored(places, donor).reshape(n, 3))
        changed += (pair.high > 0) + (pair.low < 0)
    means, control = torch.stack(found).mean(0), torch.stack(controls).mean(0)
    rows = [
        [f"entering layer {i}", *(f"{x:.2f}" for x in means[i].tolist()), *(f"{x:.2f}" for x in control[i].tolist())]
        for i in range(n)
    ]
    line = SHARED[0]
    clean, corrupted = around(0, line, 0), around(2, line, 0)
    pair = Pair(model, labels, clean, corrupted, (0, 2))
    starts = range(0, pair.length, WINDOW)
    shares = pair.restored([(i, slice(s, s + WINDOW)) for i in range(n) for s in starts]).reshape(n, -1)
    spans = [visible(corrupted[s : s + WINDOW], s) for s in starts]
    return Section(
        "Where the language of an ambiguous line sits",
        f"{lines} lines that could stand anywhere ({', '.join(map(repr, SHARED[:lines]))}) between {SIDE} characters of"
        " one language on each side. The lead is one language's logit less another's, a mean over the line; with the"
        " one around it, it is positive, and with the other negative, in"
        f" {changed / (2 * len(found)):.0%} of the runs. Then a part of the first run's stream is put into the second."
        f" 0: the line is read as before; 1: as in the first run. Means over {len(found)} runs: every line, and all"
        f" ordered pairs of {', '.join(LANGUAGES)}.",
        Table(
            ["patched stream", "before", "the line", "after", "control: before", "the line", "after"],
            rows,
        ),
        [layer_map(shares, spans, "restored share", "{:+.2f}", [f"entering layer {i}" for i in range(n)])],
        "The control puts in a run of the second one's own language with other words. The map is one pair, Python put"
        f" into SQL, {WINDOW} characters at a time; under each column stand the characters of the SQL text.",
    )


def visible(text: str, start: int) -> str:
    """Characters as a label, each one different."""
    return f"{start}: " + text.replace("\n", "⏎").replace(" ", "·")
