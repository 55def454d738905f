"""What reading costs: run_with_cache against a plain forward, against mamba-lens, and hooks at every site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hooked_mamba import HookedMamba
from tests.benchmarks import child, peers
from tests.benchmarks.models import backends, shape_text, tokens_for, with_backend
from tests.benchmarks.report import Bound, Section, Table, number, relative_error, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race, ratio, seconds

LIMIT = 1.25
"""Times a forward that run_with_cache of all default sites may take once warm."""


def run(sizes: Sizes) -> Section:
    """Caches of a model of full size."""
    b, l = sizes.grad_shape
    hf_model, tokens = peers.transformers_model(sizes), tokens_for(sizes)
    model = HookedMamba.from_hf(hf_model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        _, state = model(tokens, return_state=True)
    section = Section(
        "run_with_cache",
        f"{shape_text(sizes)}, {b} x {l}. All default sites are {len(cache)} tensors,"
        f" {cache.nbytes() / 2**20:,.0f} MiB; every cache is freed before the next one is made. The first call is the"
        " first with a cache in a fresh process that has run two forwards.",
        remarks=peers.remarks("mamba_lens"),
    )
    del cache
    for name in backends(sizes):
        runs = {
            "forward": lambda: model(tokens),
            "forward from a state": lambda: model(tokens, initial_state=state),
            "run_with_cache": lambda: model.run_with_cache(tokens),
            "run_with_cache from a state": lambda: model.run_with_cache(tokens, initial_state=state),
            "one site a layer": lambda: model.run_with_cache(tokens, names_filter="blocks.*.hook_resid_post"),
        }
        timings = race({what: with_backend(name, run) for what, run in runs.items()}, sizes)
        section.tables.append(timing_table(f"Warm, {name}", timings, "forward", cost=True))
        first = child.call("tests.benchmarks.cache:first_call", sizes, name=name)
        section.tables.append(
            Table(
                f"First call, {name}",
                ["", "times the time of forward", "CPU ms"],
                [
                    ["forward", "1.00", number(first[0])],
                    ["run_with_cache", number(first[1] / first[0]), number(first[1])],
                ],
            )
        )
        if sizes.claims:
            cost = ratio(timings["run_with_cache"], timings["forward"])
            section.bounds.append(Bound(f"Warm, {name}, times a forward", cost, LIMIT, False))
    if not peers.why_missing("mamba_lens"):
        section.tables.append(_mamba_lens(sizes, hf_model, model))
    return section


def first_call(sizes: Sizes, name: str) -> tuple[float, float]:
    """CPU milliseconds of a second forward and of the first run_with_cache in this process."""
    model, tokens = HookedMamba.from_hf(peers.transformers_model(sizes)), tokens_for(sizes)
    forward = with_backend(name, lambda: model(tokens))
    forward()
    cpu = [seconds(run)[0] for run in (forward, with_backend(name, lambda: model.run_with_cache(tokens)))]
    return 1e3 * cpu[0], 1e3 * cpu[1]


def _mamba_lens(sizes: Sizes, hf_model: Any, model: HookedMamba) -> Table:
    """Its cache against ours, without the sites of size b l E N, which ours leaves out by itself."""
    peer, tokens = peers.mamba_lens_model(hf_model, model.cfg), tokens_for(sizes)
    large = ("hook_A_bar", "hook_B_bar", "hook_h")  # its list of names has hook_h.{t} for every t
    names = [name for name in peer.hook_dict if name.split(".")[-1] not in large and ".hook_h." not in name]
    runs: dict[str, Callable[[], Any]] = {
        "mamba-lens, forward": torch.no_grad()(lambda: peer(tokens)),
        "mamba-lens, run_with_cache": torch.no_grad()(lambda: peer.run_with_cache(tokens, names_filter=names)[0]),
    }
    for name in backends(sizes):
        runs[f"ours, {name}, forward"] = with_backend(name, lambda: model(tokens))
        runs[f"ours, {name}, run_with_cache"] = with_backend(name, lambda: model.run_with_cache(tokens)[0])
    mine = runs["ours, torch, forward"]().double()
    differences = {what: number(relative_error(run(), mine)) for what, run in runs.items()}
    timings = race(runs, sizes)
    title = "Against mamba-lens, without its sites of size b l E N"
    return timing_table(title, timings, "mamba-lens, run_with_cache", extra={"difference from ours": differences})


def run_hooks(sizes: Sizes) -> Section:
    """The price of hook points on a model so small that nothing else costs much."""
    small = HookedMamba.from_hf(peers.transformers_model(_tiny(sizes)))
    tokens = tokens_for(_tiny(sizes), (1, 64) if sizes.fresh_process else (1, 5))
    default = [(name, _look) for name in small.default_names()]
    every = [(name, _look) for name in small.hook_dict]
    section = Section(
        "Hooks on a tiny model",
        f"{shape_text(_tiny(sizes))}, 1 x {tokens.shape[1]}. A hook here looks at nothing and returns None; it gets a"
        " copy of the value, since it might edit it. The model has"
        f" {len(every)} sites, {len(default)} of them default.",
    )
    runs = {
        "forward": lambda: small(tokens),
        "one hook": lambda: small.run_with_hooks(tokens, fwd_hooks=default[:1]),
        "a hook at every default site": lambda: small.run_with_hooks(tokens, fwd_hooks=default),
        "a hook at every site": lambda: small.run_with_hooks(tokens, fwd_hooks=every),
        "run_with_cache, default sites": lambda: small.run_with_cache(tokens),
        "run_with_cache, every site": lambda: small.run_with_cache(tokens, names_filter="*"),
    }
    timings = race({what: with_backend("torch", run) for what, run in runs.items()}, sizes)
    section.tables.append(timing_table("torch", timings, "forward", cost=True))
    return section


def _look(value: torch.Tensor, hook: Any) -> None:
    return None


def _tiny(sizes: Sizes) -> Sizes:
    return replace(
        sizes, d_model=min(128, sizes.d_model), n_layers=min(4, sizes.n_layers), d_vocab=min(4096, sizes.d_vocab)
    )
