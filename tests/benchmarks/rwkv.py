"""A whole RWKV-7 of 0.1B's shape beside the package `rwkv`, on the CPU, from one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mamba import HookedRWKV7
from hooked_mamba.ops.products import linear
from hooked_mamba.recurrent_config import RWKV7Config
from tests.benchmarks import peers
from tests.benchmarks.report import Bound, Section, number, relative_error, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race, ratio

GAIN = 3
"""Times faster than rwkv that we promise."""
FLOOR = "the large matrix products alone"
SETTINGS = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}


def model_for(sizes: Sizes) -> HookedRWKV7:
    """Random weights, none of them at its usual 0."""
    full = sizes.claims
    ranks = {"decay_rank": 64, "rate_rank": 64, "value_rank": 32, "gate_rank": 128} if full else {}
    cfg = RWKV7Config(
        d_model=768 if full else 64, n_layers=12 if full else 2, d_vocab=65536 if full else sizes.d_vocab, **ranks
    )
    model = HookedRWKV7(cfg, seed=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.01)
    return model


def theirs(model: HookedRWKV7) -> Callable[[Tensor], Tensor]:
    """The same weights in the package `rwkv`, all positions at once."""
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        model.save_pretrained(folder, format="raw")
        from rwkv.model import RWKV

        (file,) = Path(folder).glob("*.pth")
        peer: Any = RWKV(model=str(file.with_suffix("")), strategy="cpu fp32")
    return lambda tokens: peer.forward(tokens[0].tolist(), None, full_output=True)[0]


def products(model: HookedRWKV7, length: int) -> Callable[[], None]:
    """What no implementation of the model can do without."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = {w.shape[1]: torch.randn(1, length, w.shape[1]) for w in weights}

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return run


@torch.no_grad()
def run(sizes: Sizes) -> Section:
    """Logits of one prompt."""
    length = sizes.grad_shape[1]
    section = Section(
        "A whole RWKV-7",
        f"Random weights at the shape of RWKV-7 0.1B (768 x 12, 65,536 tokens), 1 x {length}, float32, no hooks; `rwkv`"
        " 0.8.32 with its TorchScript on reads the same file. Its scan on a CPU is a loop over positions.",
        remarks=peers.remarks("rwkv"),
    )
    model = model_for(sizes)
    tokens = torch.randint(1, model.cfg.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: model(tokens)}
    runs["ours, run_with_cache"] = lambda: model.run_with_cache(tokens)
    errors = {}
    if not peers.why_missing("rwkv"):
        peer = theirs(model)
        runs = {"rwkv": lambda: peer(tokens), **runs}
        errors = {"rwkv": number(relative_error(peer(tokens)[None], model(tokens).double()))}
    runs = {name: torch.no_grad()(run) for name, run in runs.items()}
    timings = race(runs | {FLOOR: products(model, length)}, sizes)
    section.tables.append(
        timing_table(f"Forward, 1 x {length}", timings, next(iter(runs)), extra={"distance from ours": errors})
    )
    if sizes.claims and "rwkv" in timings:
        gain = ratio(timings["rwkv"], timings["ours"])
        section.bounds.append(Bound("RWKV-7 forward, times faster than rwkv", gain, GAIN, True))
    return section
