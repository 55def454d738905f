"""States, hidden attention and patching sweeps against TransformerLens 4 and mamba-lens, and how much memory they need.

The two libraries need different versions of transformer-lens, so each is raced against ours in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_mamba import HookedMamba, MambaConfig
from tests.benchmarks import child, peers
from tests.benchmarks.analysis_contenders import MAMBA_LENS, NAMES, TASKS, TITLES, TRANSFORMER_LENS, Task
from tests.benchmarks.memory import peak_above
from tests.benchmarks.report import Bound, Section, Table, number, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import Timing, ratio

SPEEDUP = 10
"""Times less that a state and hidden attention must take at the first shape, which is 64 positions."""
ATTENTION_MIB = 1024
"""Memory above the weights in which mean hidden attention must fit at the long shape of a model of full size."""

STATE_SITES = ["x", "dt", "B", "C"]
"""All that a state or hidden attention is computed from."""


def run(sizes: Sizes) -> Section:
    """States and hidden attention of one layer, and a sweep of patches, against other libraries."""
    section = Section(
        "Analysis: states, hidden attention, patching",
        f"One layer of random weights, N={sizes.N}, float32; d=768 is the shape of mamba-130m. TransformerLens"
        f" {peers.transformer_lens_version()}"
        " computes states and attention from a cache, as we do; caches are made before the clock starts (its hooks"
        " inside the mixer fire with `eager_scan=True` and `use_cache=False` only). It forms several tensors of b E N"
        " l^2 numbers, 6.4 GB each at d=768 and 256 positions, so that the layer is narrower there. mamba-lens has"
        " states as hooks of a forward pass, and so has TransformerLens with `eager_scan=True`: there whole forward"
        " passes are compared, which keep the layer's states. Errors are against the plain loop in float64. Memory"
        " is what was resident at the peak of one call in a fresh process, above what was resident before it. A sweep"
        " patches the residual stream entering every block at every position, one metric each; theirs runs one"
        ' forward pass per patch. "auto" takes the numba scan where that gains.',
        remarks=peers.remarks(TRANSFORMER_LENS, MAMBA_LENS),
    )
    tasks = [Task(what, d, l) for d, l in sizes.analysis for what in ("state", "attention", "forward")]
    d, n_layers, l = sizes.sweep
    tasks.append(Task("sweep", d, l, n_layers))
    present = [peer for peer in (TRANSFORMER_LENS, MAMBA_LENS) if not peers.why_missing(peer)]
    for task in tasks:
        for peer in [p for p in present if task.what in TASKS[p]] or [None]:
            found = child.call(
                "tests.benchmarks.analysis_contenders:compare", sizes, fresh=peer is not None, peer=peer, **vars(task)
            )
            table, gain = _table(task, peer, found, sizes)
            section.tables.append(table)
            first = (task.d_model, task.length) == sizes.analysis[0] and task.what in ("state", "attention")
            if sizes.claims and first and gain is not None:
                what = f"{TITLES[task.what]}, 1 x {task.length}, times faster than {NAMES[peer]}"
                section.bounds.append(Bound(what, gain, SPEEDUP, True))
    return section


def run_long(sizes: Sizes) -> Section:
    """Whether mean hidden attention of many positions fits into memory."""
    b, l = sizes.attention_shape
    section = Section(
        "Hidden attention of many positions",
        f"A model of d={sizes.d_model} and {sizes.n_layers} layers, random weights, float32, {b} x {l}: the"
        " forward pass that caches what is needed (x, dt, B and C of one layer, or of all), and the hidden attention"
        " averaged over a layer's channels, all queries. Memory is that of both together, above the weights. A matrix"
        f" for each channel would be {b * 2 * sizes.d_model * l * l * 4 / 2**30:,.0f} GiB a layer.",
    )
    rows, peak = [], None
    for what in ("one layer", "every layer"):
        found = child.call("tests.benchmarks.analysis:long_attention", sizes, every=what == "every layer")
        peak = found if peak is None else peak
        rows.append([what, number(found)])
    section.tables.append(Table(f"Mean hidden attention, {b} x {l}", ["", "MiB"], rows))
    if sizes.claims and peak is not None:
        section.bounds.append(Bound("One layer, MiB", peak, ATTENTION_MIB, False))
    return section


def long_attention(sizes: Sizes, every: bool) -> float | None:
    """MiB above the weights of a forward pass with what hidden attention needs, and of the attention."""
    cfg = MambaConfig(d_model=sizes.d_model, n_layers=sizes.n_layers, d_vocab=sizes.d_vocab, d_state=sizes.N)
    model = HookedMamba(cfg, seed=0)
    layers = range(cfg.n_layers) if every else [0]
    names = [f"blocks.{i}.mixer.hook_{site}" for i in layers for site in STATE_SITES]

    @torch.no_grad()
    def attend(length: int) -> Tensor:
        tokens = torch.ones(sizes.attention_shape[0], length, dtype=torch.long)
        _, cache = model.run_with_cache(tokens, names_filter=names, stop_at_layer=cfg.n_layers)
        return torch.stack([cache.hidden_attention(i, average=True) for i in layers])

    attend(4)
    return peak_above(lambda: attend(sizes.attention_shape[1]))


# The tables --------------------------------------------------------------------------------------------------------


def _table(task: Task, peer: str | None, found: dict[str, dict[str, Any]], sizes: Sizes) -> tuple[Table, float | None]:
    """Ratios first; and how many times faster our slowest way to do the same is than the peer's."""
    timings = {name: Timing(row["cpu"], row["wall"]) for name, row in found.items()}
    extra = {"error": {name: number(row["error"]) for name, row in found.items()}}
    if any(row["peak"] is not None for row in found.values()):
        extra["MiB"] = {name: number(row["peak"]) for name, row in found.items()}
    reference = next(iter(found))
    title = f"{TITLES[task.what]}, d={task.d_model}, 1 x {task.length}"
    if task.n_layers > 1:
        title += f", {task.n_layers} layers"
    same = [name for name in ("ours", "ours, torch") if name in timings]
    gain = ratio(timings[reference], timings[same[0]]) if peer and same else None
    return timing_table(title, timings, reference, extra=extra), gain
