"""Forward pass and generation of a whole Mamba-1 against other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_mamba import HookedMamba
from tests.benchmarks import peers
from tests.benchmarks.models import backend, backends, products, shape_text, tokens_for, with_backend
from tests.benchmarks.report import Bound, Section, number, relative_error, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race, ratio

FLOOR = "the matrix products alone"
GAINS = {"torch": 2.7, "numba": 3.6}
"""Times faster than transformers that we promise."""


def run(sizes: Sizes) -> Section:
    """Logits of one prompt."""
    b, l = sizes.grad_shape
    section = Section(
        "A whole model, forward",
        f"{shape_text(sizes)}, {b} x {l}, the same weights in every library, no hooks. Errors: largest difference of a"
        " logit from a float64 forward with the plain loop, by the largest logit.",
        remarks=peers.remarks("mambapy.mamba"),
    )
    hf_model, tokens = peers.transformers_model(sizes), tokens_for(sizes)
    model = HookedMamba.from_hf(hf_model)
    runs: dict[str, Callable[[], Any]] = {"transformers": lambda: hf_model(tokens, use_cache=False).logits}
    if not peers.why_missing("mambapy.mamba"):
        peer = peers.mambapy_model(hf_model, model.cfg)
        runs["mamba.py"] = lambda: peer(tokens)
    for name in backends(sizes):
        runs[f"ours, {name}"] = with_backend(name, lambda: model(tokens))
    runs = {name: torch.no_grad()(run) for name, run in runs.items()}

    with backend("naive"), torch.no_grad():
        exact = HookedMamba.from_hf(hf_model).double()(tokens)
    errors = {name: number(relative_error(run(), exact)) for name, run in runs.items()}
    del exact
    timings = race(runs | {FLOOR: products(model, (b, l))}, sizes)
    section.tables.append(timing_table(f"Forward, {b} x {l}", timings, "transformers", extra={"error": errors}))
    if sizes.claims:
        for name in backends(sizes):
            gain = ratio(timings["transformers"], timings[f"ours, {name}"])
            what = f"Forward, {name}, times faster than transformers"
            section.bounds.append(Bound(what, gain, GAINS[name], True))
    return section


def run_generation(sizes: Sizes) -> Section:
    """Greedy continuation of a prompt."""
    new = sizes.new_tokens
    section = Section(
        "Generation",
        f"{shape_text(sizes)}; {new} tokens, greedy, after a prompt of 8. mamba.py's step runs in a loop of ours, since"
        " its own needs a tokenizer. A step is bound by reading the weights once.",
        remarks=peers.remarks("mambapy.mamba"),
    )
    hf_model, prompt = peers.transformers_model(sizes), tokens_for(sizes, (1, 8))
    hf_model.generation_config.eos_token_id = None
    model = HookedMamba.from_hf(hf_model)
    step_products = products(model, (1, 1))
    runs: dict[str, Callable[[], Any]] = {
        "transformers": lambda: hf_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
        ),
    }
    if not peers.why_missing("mambapy.mamba"):
        peer = peers.mambapy_model(hf_model, model.cfg)
        runs["mamba.py"] = lambda: _stepwise(peer, prompt, new)
    runs["ours"] = lambda: model.generate(prompt, max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False)
    runs = {name: torch.no_grad()(run) for name, run in runs.items()}
    expected = runs["ours"]()
    same = {name: "yes" if torch.equal(run(), expected) else "no" for name, run in runs.items()}
    timings = race(runs | {f"{FLOOR}, {new} steps": lambda: [step_products() for _ in range(new)]}, sizes)
    speed = {name: number(1e3 * new / max(timing.wall_ms, 1e-6)) for name, timing in timings.items()}
    extra = {"tokens a second": speed, "the tokens we give": same}
    section.tables.append(timing_table(f"{new} new tokens", timings, "transformers", extra=extra))
    return section


def _stepwise(peer: Any, prompt: Tensor, new: int) -> Tensor:
    """Greedy generation by mamba.py's own step."""
    cfg = peer.config
    caches = [(None, torch.zeros(1, cfg.d_inner, cfg.d_conv - 1)) for _ in range(cfg.n_layers)]
    tokens = list(prompt[0])
    for i in range(len(tokens) + new - 1):
        logits, caches = peer.step(tokens[i][None], caches)
        if i >= prompt.shape[1] - 1:
            tokens.append(logits[0].argmax())
    return torch.stack(tokens)[None]
