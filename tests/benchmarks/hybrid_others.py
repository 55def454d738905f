"""The tiny Nemotron-H and Granite 4 in nemotron-lens and nnsight: what can be read and edited, and how long it takes.

Each library has a process of its own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from hooked_mamba import HookedHybrid
from tests.benchmarks import child, peers
from tests.benchmarks.report import Section, Table, number, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import Timing, race
from tests.hooked_mamba.hybrids.tiny import tokens_for, twin

NNSIGHT = "nnsight_8"
"""The folder of nnsight 0.8 inside the other peers': SAEs' libraries need an older one."""
TASKS = {"nemotron-lens 0.1.0": ("nemotron_lens", "nemotron"), "nnsight 0.8.1": (NNSIGHT, "granite-moe")}
"""Library -> (what must be importable, the tiny model it is given)."""


def add(section: Section, sizes: Sizes) -> None:
    """Tables for those that are there, remarks for those that are not."""
    rows = []
    for library, (module, case) in TASKS.items():
        if reason := peers.why_missing(module):
            section.remarks.append(reason)
            continue
        function = f"tests.benchmarks.hybrid_others:{module}"
        found = child.call(function, sizes, fresh=True, case=case)
        rows += [[f"{library}, {case}: {what}", answer] for what, answer in found["answers"].items()]
        timings = {name: Timing(**times) for name, times in found["times"].items()}
        section.tables.append(timing_table(f"{library}, {case}, a forward pass that keeps sites", timings, "theirs"))
    if rows:
        section.tables.append(Table("nemotron-lens and nnsight", ["", "found"], rows))


@torch.no_grad()
def nemotron_lens(sizes: Sizes, case: str) -> dict[str, Any]:
    """Which sites there are, and whether one is what its name says."""
    from nemotron_lens import HookedNemotron

    hf, tokens = twin(case), tokens_for(1, sizes.sweep[2])
    theirs, ours = HookedNemotron(hf), HookedHybrid.from_hf(hf).requires_grad_(False)
    names = theirs.hook_points(include_experts=True)
    cache, (_, mine) = theirs.run_with_cache(tokens, names=names)[1], ours.run_with_cache(tokens)
    [before] = [name for name in names if name.endswith("attn_out_prelinear")]
    layer = int(before.split(".")[1])
    off = float((cache[before] - mine["attn.out", layer]).abs().max())
    kinds = sorted({name.split(".hook_")[1] for name in names})
    absent = [what for what in ("generate", "decompose_resid", "initial_state") if not hasattr(theirs, what)]
    answers = {
        "kinds of its sites, with those of experts": ", ".join(kinds),
        "`attn_out_prelinear` less the output of o_proj": number(off),
        "methods that it has not": ", ".join(absent),
    }
    kept = tuple(name for name in mine if name.endswith(("hook_resid_pre", "hook_resid_post", "_out")))
    runs: dict[str, Callable[[], Any]] = {
        "theirs": lambda: theirs.run_with_cache(tokens, names=names),
        "ours, sites like these": lambda: ours.run_with_cache(tokens, names_filter=kept),
        "ours, all default sites": lambda: ours.run_with_cache(tokens),
    }
    return {"answers": answers, "times": times(runs, sizes)}


@torch.no_grad()
def nnsight_8(sizes: Sizes, case: str) -> dict[str, Any]:
    """What can be saved in a trace, and what an edit does."""
    package = importlib.import_module(NNSIGHT)
    sys.path.insert(0, next(iter(package.__path__)))
    nnsight = importlib.import_module("nnsight")
    hf, tokens = twin(case), tokens_for(1, sizes.sweep[2])
    ours = HookedHybrid.from_hf(hf).requires_grad_(False)
    hf.set_attn_implementation("eager")
    model = nnsight.NNsight(hf)
    mixer, attention = model.model.layers[0].mamba, model.model.layers[1].self_attn
    clean = hf(tokens).logits

    def streams() -> Any:
        with model.trace(tokens):
            kept = nnsight.save([])
            for layer in model.model.layers:
                kept.append(layer.output)
        return kept

    def convolution() -> str:
        with model.trace(tokens):
            found = mixer.conv1d.output.save()
        return str(tuple(found.shape))

    def scan() -> str:
        with model.trace(tokens):
            found = mixer.source.mamba2_chunk_scan_0.output.save()
        return f"its output, {', '.join(str(tuple(x.shape)) for x in found)}"

    def inside() -> str:
        with model.trace(tokens):
            found = mixer.source.mamba2_chunk_scan_0.source.implementation_0.source.torch_cumsum_0.output.save()
        return f"shape {tuple(found.shape)}, by chunks"

    def pattern() -> str:
        with model.trace(tokens):
            attention.output[1][:] = 0
            found = model.output.save()
        return f"logits change by {float((found.logits - clean).abs().max()):.3g}"

    def deeper() -> str:
        with model.trace(tokens):
            attention.source.attention_interface_1.source.nn_functional_dropout_0.output[:] = 0
            found = model.output.save()
        return f"logits change by {float((found.logits - clean).abs().max()):.3g}"

    answers = {
        "`conv1d.output`": outcome(convolution),
        "the scan, `.source`": outcome(scan),
        "a line inside it, `.source.mamba2_chunk_scan_0.source.implementation_0.source`": outcome(inside),
        "0 into the pattern that attention returns (it must be eager)": outcome(pattern),
        "0 into it where it is used, `.source.attention_interface_1.source`": outcome(deeper),
    }
    runs: dict[str, Callable[[], Any]] = {
        "theirs": streams,
        "ours, sites like these": lambda: ours.run_with_cache(tokens, names_filter="blocks.*.hook_resid_post"),
        "ours, all default sites": lambda: ours.run_with_cache(tokens),
    }
    return {"answers": answers, "times": times(runs, sizes)}


def times(runs: dict[str, Callable[[], Any]], sizes: Sizes) -> dict[str, Any]:
    """Of all rounds, for JSON."""
    calls = {name: torch.no_grad()(call) for name, call in runs.items()}
    return {name: vars(timing) for name, timing in race(calls, sizes).items()}


def outcome(call: Callable[[], str]) -> str:
    """What a call gives, or the kind of error that it ends with."""
    try:
        return peers.quietly(call)
    except Exception as error:  # whatever a peer raises is what is to be told
        return type(error).__name__
