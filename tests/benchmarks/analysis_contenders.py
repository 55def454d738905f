"""One layer's states and hidden attention, and a sweep of patches, each by several libraries with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_mamba import ActivationCache, HookedMamba, patching
from tests.benchmarks import child, peers
from tests.benchmarks.memory import peak_above
from tests.benchmarks.models import backends, with_backend
from tests.benchmarks.report import relative_error
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race

TRANSFORMER_LENS, MAMBA_LENS = "transformer_lens_4", "mamba_lens"
VOCABULARY = 504
"""mamba-lens takes multiples of 8."""
HERE = "tests.benchmarks.analysis_contenders:"


@dataclass(frozen=True)
class Task:
    """One comparison."""

    what: str
    d_model: int
    length: int
    n_layers: int = 1


@dataclass
class Contender:
    """One way to do a task."""

    call: Callable[[], Any]
    check: Callable[[Any], float] | None = None
    """The error of what it gives; None where nothing else gives the same."""


TITLES = {
    "state": "State after every position, from a cache",
    "attention": "Hidden attention, from a cache",
    "forward": "State after every position, with the forward pass",
    "sweep": "Patching resid_pre, layer x position",
}
TASKS = {TRANSFORMER_LENS: ("state", "attention", "forward", "sweep"), MAMBA_LENS: ("forward", "sweep")}
NAMES = {TRANSFORMER_LENS: "TransformerLens", MAMBA_LENS: "mamba-lens"}


MEASURED = ("state", "attention")
"""What the memory of is measured as well, in a process of its own for each contender."""


def compare(
    sizes: Sizes, peer: str | None, what: str, d_model: int, length: int, n_layers: int
) -> dict[str, dict[str, Any]]:
    """Times and errors of every contender; and each one's peak, in a process of its own."""
    task = Task(what, d_model, length, n_layers)
    contenders = contenders_for(sizes, peer, task)
    with torch.no_grad():
        errors = {name: c.check(c.call()) if c.check else None for name, c in contenders.items()}
    timings = race({name: c.call for name, c in contenders.items()}, sizes)
    return {
        name: {
            "cpu": timings[name].cpu,
            "wall": timings[name].wall,
            "error": errors[name],
            "peak": child.call(f"{HERE}peak", sizes, peer=peer, name=name, **vars(task)) if what in MEASURED else None,
        }
        for name in contenders
    }


def peak(sizes: Sizes, peer: str | None, name: str, what: str, d_model: int, length: int, n_layers: int) -> Any:
    """MiB of one contender's call, after one at a smaller length for what loads at the first."""
    contenders_for(sizes, peer, Task(what, d_model, min(32, length), n_layers))[name].call()
    return peak_above(contenders_for(sizes, peer, Task(what, d_model, length, n_layers))[name].call)


def contenders_for(sizes: Sizes, peer: str | None, task: Task) -> dict[str, Contender]:
    sized = Sizes(**{**vars(sizes), "d_model": task.d_model, "n_layers": task.n_layers, "d_vocab": VOCABULARY})
    hf_model = peers.transformers_model(sized)
    model = HookedMamba.from_hf(hf_model)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(1, VOCABULARY, (1, task.length), generator=generator) for _ in range(2))
    theirs = {
        None: lambda *_: {},
        TRANSFORMER_LENS: _transformer_lens,
        MAMBA_LENS: _mamba_lens,
    }[peer](hf_model, model, task, clean, corrupted)
    found = {**theirs, **_ours(sizes, model, task, clean, corrupted)}
    if task.what == "sweep":
        expected = exact_sweep(model, clean, corrupted)
        checks = {name: lambda got: relative_error(got, expected) for name in found}
    else:
        exact = exact_states if task.what in ("state", "forward") else exact_attention
        expected = exact(model, clean)
        checks = {name: lambda got: relative_error(got, expected) for name in found if "query" not in name}
        checks["ours, the last query"] = lambda got: relative_error(got, expected[:, :, -1])
        checks["ours, mean over channels"] = lambda got: relative_error(got, expected.mean(1))
    return {name: Contender(torch.no_grad()(call), checks[name]) for name, call in found.items()}


def _ours(
    sizes: Sizes, model: HookedMamba, task: Task, clean: Tensor, corrupted: Tensor
) -> dict[str, Callable[[], Any]]:
    fastest = "auto" if "numba" in backends(sizes) else "torch"

    def ours(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        return {f"ours, {name}": with_backend(name, call) for name in dict.fromkeys(("torch", fastest))}

    if task.what == "forward":
        site = "blocks.0.mixer.hook_h"
        return ours(lambda: model.run_with_cache(clean, names_filter=site)[1][site])
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    if task.what == "state":
        return ours(lambda: cache.compute_ssm_state(0))
    if task.what == "attention":
        return {
            "ours": lambda: cache.compute_ssm_effective_attention(0, include_dt_scaling=True),
            "ours, the last query": lambda: cache.hidden_attention(0, queries=-1, include_skip=False),
            "ours, mean over channels": lambda: cache.hidden_attention(0, average=True, include_skip=False),
        }
    return ours(lambda: patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False))


def _transformer_lens(
    hf_model: Any, model: HookedMamba, task: Task, clean: Tensor, corrupted: Tensor
) -> dict[str, Callable[[], Any]]:
    bridge, theirs = peers.transformer_lens_model(hf_model), NAMES[TRANSFORMER_LENS]
    if task.what == "sweep":
        _, cache = peers.quietly(lambda: bridge.run_with_cache(clean))
        sweep = peers.transformer_lens_patching().get_act_patch_resid_pre
        return {theirs: lambda: peers.quietly(lambda: sweep(bridge, corrupted, cache, metric))}
    bridge.blocks[0].mixer.eager_scan = True
    if task.what == "forward":
        site = "blocks.0.mixer.hook_ssm_state"
        return {
            theirs: lambda: bridge.run_with_cache(clean, use_cache=False, names_filter=[site])[1][site].transpose(1, 2)
        }
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean, use_cache=False)
    if task.what == "state":
        return {theirs: lambda: cache.compute_ssm_state(0).transpose(1, 2)}
    return {theirs: lambda: cache.compute_ssm_effective_attention(0, include_dt_scaling=True)}


def _mamba_lens(
    hf_model: Any, model: HookedMamba, task: Task, clean: Tensor, corrupted: Tensor
) -> dict[str, Callable[[], Any]]:
    peer, theirs = peers.mamba_lens_model(hf_model, model.cfg), NAMES[MAMBA_LENS]
    if task.what == "sweep":
        peer.cfg.n_heads = 0  # transformer-lens' sweeps ask for it, and its config lacks it
        with torch.no_grad():
            _, cache = peer.run_with_cache(clean)
        sweep = peers.transformer_lens_patching().get_act_patch_resid_pre
        return {theirs: lambda: peers.quietly(lambda: sweep(peer, corrupted, cache, metric))}
    sites = [f"blocks.0.hook_h.{t}" for t in range(task.length)]

    def states() -> Tensor:
        cache = peer.run_with_cache(clean, names_filter=sites)[1]
        return torch.stack([cache[site] for site in sites], 1)

    return {theirs: states}


def metric(logits: Tensor) -> Tensor:
    """What a sweep measures."""
    return logits[0, -1, 5] - logits[0, -1, 6]


# What it should be, in float64 -------------------------------------------------------------------------------------


def exact_cache(model: HookedMamba, tokens: Tensor) -> ActivationCache:
    """The sites of a forward pass in float64 by the plain loop."""
    return with_backend("naive", lambda: copy.deepcopy(model).double().run_with_cache(tokens)[1])()


def exact_states(model: HookedMamba, tokens: Tensor) -> Tensor:
    """b l E N, step by step."""
    cache = exact_cache(model, tokens)
    x, dt, B = (cache[site, 0] for site in ("x", "dt", "B"))
    A = cache.model.blocks[0].mixer.A.detach()
    h, states = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        states.append(h)
    return torch.stack(states, 1)


def exact_attention(model: HookedMamba, tokens: Tensor) -> Tensor:
    """b E l l without the skip: what every source has left in the state, read out at every position."""
    cache = exact_cache(model, tokens)
    dt, B, C = (cache[site, 0] for site in ("dt", "B", "C"))
    A = cache.model.blocks[0].mixer.A.detach()
    b, l, E = dt.shape
    left, rows = torch.zeros(b, E, l, A.shape[1], dtype=dt.dtype), []
    for t in range(l):
        left *= torch.exp(dt[:, t, :, None] * A)[:, :, None]
        left[:, :, t] = dt[:, t, :, None] * B[:, t, None]
        rows.append(torch.einsum("besn,bn->bes", left, C[:, t]))
    return torch.stack(rows, 2)


@torch.no_grad()
def exact_sweep(model: HookedMamba, clean: Tensor, corrupted: Tensor) -> Tensor:
    """layer x position in float64: one whole forward pass per patch."""
    double = copy.deepcopy(model).double()
    values = torch.zeros(model.cfg.n_layers, clean.shape[1], dtype=torch.float64)
    sources = [double(clean, stop_at_layer=i) if i else double.embed(clean) for i in range(model.cfg.n_layers)]
    for i, source in enumerate(sources):
        for t in range(clean.shape[1]):
            stream = double(corrupted, stop_at_layer=i) if i else double.embed(corrupted)
            stream[:, t] = source[:, t]
            values[i, t] = metric(double(stream, start_at_layer=i))
    return values
