"""What graphs and sweeps of patches cost, in forward passes of the same prompt."""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from circuits import FrozenModel, Logit
from circuits.build import build_graph
from hooked_mamba import HookedMamba, MambaConfig, patching
from saes import SparseCoder, mambacoder_config, sae_config
from tests.benchmarks import child
from tests.benchmarks.memory import peak_above
from tests.benchmarks.models import shape_text
from tests.benchmarks.report import Section, Table, number, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race

FORWARD = "forward"


def run(sizes: Sizes) -> Section:
    """Two graphs and a sweep, each beside a forward pass."""
    g = sizes.graphs
    section = Section(
        "Graphs and sweeps",
        f"{shape_text(sizes)}. The graph of features has a coder of {g.d_sae:,} latents, {g.k} of them active, in place"
        f" of every mixer, and {g.features} features traced; with a coder everywhere nothing moves between positions."
        f" The graph of writes has a dictionary of {g.d_sae // 4:,} latents, {g.k} of them active, on what every mixer"
        " writes into its memory, and as many features traced, whose effects go to all later positions."
        f" The graph of heads has no coders and {g.heads} heads (layer, source, channel) as nodes. The prompt's own run"
        " is not part of either. A sweep patches the residual stream entering every block at every position; the metric"
        " reads the last position. Random weights: a trained model chooses other nodes, at other places.",
    )
    section.tables.append(_graphs(sizes))
    section.tables.append(_sweep(sizes))
    rows = []
    for what in ("features", "writes", "heads"):
        rounds = 3 if sizes.claims else 1  # what the allocator keeps between steps differs from process to process
        found = (child.call("tests.benchmarks.graphs:memory_of", sizes, what=what) for _ in range(rounds))
        peaks = [peak for peak in found if peak is not None]
        rows.append([f"graph of {what}", number(median(peaks) if peaks else None)])
    section.tables.append(Table("Memory above the run of the prompt", ["", "MiB"], rows))
    return section


def model_of(sizes: Sizes) -> HookedMamba:
    """Random weights."""
    cfg = MambaConfig(d_model=sizes.d_model, n_layers=sizes.n_layers, d_vocab=sizes.d_vocab, d_state=sizes.N)
    return HookedMamba(cfg, seed=0).requires_grad_(False)


def coders_of(sizes: Sizes, model: HookedMamba) -> list[SparseCoder]:
    """A random coder for every block, its decoder a tenth of its start."""
    found = []
    for layer in range(model.cfg.n_layers):
        cfg = mambacoder_config(layer, sizes.d_model, sizes.graphs.d_sae, architecture="topk", k=sizes.graphs.k)
        coder = SparseCoder(cfg, seed=layer).requires_grad_(False)
        coder.W_dec.mul_(0.1)
        found.append(coder)
    return found


def writers_of(sizes: Sizes, model: HookedMamba) -> list[SparseCoder]:
    """A random write dictionary for every block, as the coders are."""
    found = []
    for layer in range(model.cfg.n_layers):
        site = f"blocks.{layer}.mixer.hook_x"
        cfg = sae_config(site, model.cfg.E, sizes.graphs.d_sae // 4, architecture="topk", k=sizes.graphs.k)
        coder = SparseCoder(cfg, seed=layer).requires_grad_(False)
        coder.W_dec.mul_(0.1)
        found.append(coder)
    return found


def _prompt(sizes: Sizes, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(sizes.d_vocab, (1, sizes.graphs.length), generator=generator)


TARGET = Logit(1, minus=2)


def _features(sizes: Sizes, frozen: FrozenModel) -> object:
    return build_graph(frozen, TARGET, max_features=sizes.graphs.features, max_heads=0)


def _heads(sizes: Sizes, frozen: FrozenModel) -> object:
    return build_graph(frozen, TARGET, max_features=0, max_heads=sizes.graphs.heads)


def _graphs(sizes: Sizes) -> Table:
    model, tokens = model_of(sizes), _prompt(sizes)
    plain, coded = FrozenModel(model, tokens), FrozenModel(model, tokens, coders_of(sizes, model))
    written = FrozenModel(model, tokens, writers_of(sizes, model))
    runs = {
        FORWARD: torch.no_grad()(lambda: model(tokens)),
        f"graph of {sizes.graphs.features} features": lambda: _features(sizes, coded),
        f"graph of {sizes.graphs.features} writes": lambda: _features(sizes, written),
        f"graph of {sizes.graphs.heads} heads": lambda: _heads(sizes, plain),
    }
    return timing_table(f"Graphs, 1 x {sizes.graphs.length}", race(runs, sizes), FORWARD, cost=True)


def _sweep(sizes: Sizes) -> Table:
    model, length = model_of(sizes), sizes.graphs.sweep_length
    clean, corrupted = (_prompt(sizes, seed)[:, :length] for seed in (0, 1))
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter="blocks.*.hook_resid_pre")

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 1] - logits[:, -1, 2]

    runs = {
        FORWARD: torch.no_grad()(lambda: model(corrupted)),
        f"sweep of {sizes.n_layers} x {length} patches": lambda: patching.get_act_patch_resid_pre(
            model, corrupted, cache, metric, progress=False
        ),
    }
    return timing_table(f"Sweep, 1 x {length}", race(runs, sizes), FORWARD, cost=True)


def memory_of(sizes: Sizes, what: str) -> float | None:
    """MiB of one graph above the run of its prompt."""
    model, tokens = model_of(sizes), _prompt(sizes)
    coders = {"features": coders_of, "writes": writers_of}.get(what)
    frozen = FrozenModel(model, tokens, () if coders is None else coders(sizes, model))
    return peak_above(lambda: _heads(sizes, frozen) if coders is None else _features(sizes, frozen))
