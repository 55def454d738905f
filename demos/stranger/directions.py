"""Hidden attention in both directions: how much comes from the left and from the right, and what is lost without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from demos.stranger.both_ways import BothWays
from demos.stranger.model import HookedStranger, tokens_of
from demos.stranger.task import accuracy
from demos.stranger.text import Document
from demos.studies.common import percent
from demos.studies.report import Section, Table, layer_map
from hooked_mamba import ActivationCache

SITES = [f"blocks.*.mixer.hook_{name}" for name in ("x", "dt", "B", "C", "gate")]


def flow(cache: ActivationCache, layer: int) -> Float[Tensor, "b l l"]:
    """The mean over channels of |alpha[t,s] u_s|, both directions together: target, source."""
    view = cache.scan_view(layer)
    assert isinstance(view, BothWays)
    total = torch.zeros(view.batch, view.length, view.length)
    for first in range(0, view.n_lanes, 32):
        lanes = slice(first, first + 32)
        total += (view.rows(lanes=lanes) * view.u[:, :, lanes, 0].transpose(1, 2).unsqueeze(2)).abs().sum(1)
    return total / view.n_lanes


@contextmanager
def cut(model: HookedStranger, layers: list[int], directions: tuple[str, ...]) -> Iterator[None]:
    """In some layers a scan passes on nothing but each position's own input; convolutions go on as ever."""
    seen: dict[tuple[int, str], Tensor] = {}

    def store(value: Tensor, hook: Any) -> None:
        seen[hook.layer(), hook.name.rpartition("hook_")[2]] = value

    def own(value: Tensor, hook: Any) -> Tensor:
        i = hook.layer()
        u, dt, B, C = (seen[i, name] for name in ("x", "dt", "B", "C"))
        return u * ((B * C).sum(-1, keepdim=True) * dt + model.mixer(i).D)

    hooks: list[Any] = [(f"blocks.{i}.mixer.hook_{name}", store) for i in layers for name in ("x", "dt", "B", "C")]
    with model.hooks([*hooks, *((f"blocks.{i}.mixer.hook_y_{one}", own) for i in layers for one in directions)]):
        yield


def directions_section(model: HookedStranger, labels: list[str], some: list[Document]) -> Section:
    """Shares of the flow, a map, and accuracies with a direction cut."""
    n = model.cfg.n_layers
    _, cache = model.run_with_cache(tokens_of(*(one.text for one in some[:2])), names_filter=SITES)
    length = len(some[0].text)
    distance = (torch.arange(length)[:, None] - torch.arange(length)).float()
    whole = accuracy(model, labels, some)
    rows, maps = [], []
    for i in range(n):
        one = flow(cache, i)
        maps.append(one[0])
        total = one.sum()
        shares = [float(one[:, part].sum() / total) for part in (distance > 0, distance == 0, distance < 0)]
        away = one.sum(0)[distance != 0]
        order = distance[distance != 0].abs().sort()
        half = order.values[(away[order.indices].cumsum(0) >= away.sum() / 2).nonzero()[0, 0]]
        lost = []
        for directions in (("ahead",), ("back",), ("ahead", "back")):
            with cut(model, [i], directions):
                lost.append(f"{100 * (accuracy(model, labels, some) - whole):+.1f}")
        rows.append([f"layer {i}", *(percent(share) for share in shares), f"{float(half):.0f}", *lost])
    everywhere = []
    for name, directions in (("from the left", ("ahead",)), ("from the right", ("back",)), ("both", ("ahead", "back"))):
        with cut(model, list(range(n)), directions):
            everywhere.append(f"{name} {percent(accuracy(model, labels, some))}")
    shown = slice(0, 48)
    deepest = max(range(n), key=lambda i: float(maps[i][shown, shown].sum() - maps[i][shown, shown].trace()))
    part = maps[deepest][shown, shown].clone()
    part.fill_diagonal_(0)
    words = [f"{s} {'⏎' if c == chr(10) else '·' if c == ' ' else c}" for s, c in enumerate(some[0].text[shown])]
    part = part / part.sum(1, keepdim=True).clamp(min=1e-30)
    return Section(
        "From the left, and from the right",
        "Each layer reads the text twice with the same weights. With dt, B and C held, what a position gets from every"
        " other is one number per channel, alpha[t,s], times that position's value u_s. Shares of |alpha u| over"
        f" channels and two documents; the distance is the one within which half of what is not a position's own comes"
        " from. Then the scans are cut in one layer, so that they pass on only a position's own value, and the accuracy"
        f" ({percent(whole)} on {len(some)} documents) changes by so many points.",
        Table(
            ["", "from the left", "own", "from the right", "half within", "left cut", "right cut", "both cut"],
            rows,
        ),
        [
            layer_map(
                part, words, f"layer {deepest}: share of |alpha u|, own left out", "{:.1%}", words, diverging=False
            )
        ],
        "Cut in all layers at once: " + ", ".join(everywhere) + ". What then is left are six convolutions, which read 1"
        " position back and 2 ahead each. The map has targets down and sources across: what is below the diagonal comes"
        " from the left, what is above it from the right.",
    )
