"""A whole Mamba-2 beside transformers, with the same random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from hooked_mamba import HookedMamba2
from tests.benchmarks.models import backend, backends, shape_text, tokens_for, with_backend
from tests.benchmarks.report import Bound, Section, number, relative_error, timing_table
from tests.benchmarks.sizes import Shape, Sizes
from tests.benchmarks.timing import Timing, race, ratio

FLOOR = "the large matrix products alone"
GAIN, CACHE = 2.3, 1.1
"""Times faster than transformers that a forward pass is to be, and forward passes that one with a cache may take."""


def run(sizes: Sizes) -> Section:
    """Logits of prompts of several lengths, and a cache of all default sites."""
    H, P, N = sizes.heads
    section = Section(
        "A whole Mamba-2, forward",
        f"{shape_text(sizes)}; {H} heads of {P} x {N}, one group; the same weights in both libraries, no hooks. Errors:"
        " largest difference of a logit from a float64 forward with the plain loop, by the largest logit.",
    )
    peer = theirs(sizes)
    model = HookedMamba2.from_hf(peer)
    with backend("naive"):
        exact = HookedMamba2.from_hf(peer).double()
    main = sizes.grad_shape
    shapes = [main] if not sizes.claims else [(1, 64), main, (1, 1024)]
    for shape in shapes:
        found = _forward(sizes, shape, peer, model, exact if shape == main else None, section)
        if sizes.claims and shape == main and "ours, numba" in found:
            gain = ratio(found["transformers"], found["ours, numba"])
            section.bounds.append(Bound("Forward, numba, times faster than transformers", gain, GAIN, True))
            cost = ratio(found["ours, run_with_cache"], found["ours, numba"])
            section.bounds.append(Bound("run_with_cache, times a forward", cost, CACHE, False))
    return section


def theirs(sizes: Sizes) -> Any:
    """transformers' model; without kernels of the hub it takes the plain path on a CPU."""
    torch.manual_seed(0)
    H, P, N = sizes.heads
    width = H * P // 2  # d_inner is twice d_model
    config = transformers.Mamba2Config(
        hidden_size=width, num_hidden_layers=sizes.n_layers, vocab_size=sizes.d_vocab, num_heads=H, head_dim=P,
        state_size=N, n_groups=1, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config).eval()


@torch.no_grad()
def _forward(
    sizes: Sizes, shape: Shape, peer: Any, model: HookedMamba2, exact: HookedMamba2 | None, section: Section
) -> dict[str, Timing]:
    tokens = tokens_for(sizes, shape)
    runs: dict[str, Callable[[], Any]] = {"transformers": lambda: peer(tokens, use_cache=False).logits}
    runs |= {f"ours, {name}": with_backend(name, lambda: model(tokens)) for name in backends(sizes, "ssd")}
    errors = {}
    if exact is not None:
        with backend("naive"):
            right = exact(tokens)
        errors = {name: number(relative_error(torch.no_grad()(run)(), right)) for name, run in runs.items()}
    runs["ours, run_with_cache"] = lambda: model.run_with_cache(tokens, return_type=None)
    runs[FLOOR] = products(model, shape)
    found = race({name: torch.no_grad()(run) for name, run in runs.items()}, sizes)
    extra = {"error": errors} if errors else None
    section.tables.append(timing_table(f"Forward, {shape[0]} x {shape[1]}", found, "transformers", extra=extra))
    return found


def products(model: HookedMamba2, shape: Shape) -> Callable[[], Any]:
    """What no implementation of the model can do without, as torch forms it."""
    normal, inner = torch.randn(*shape, model.cfg.d_model), torch.randn(*shape, model.cfg.E)

    def run() -> None:
        for block in model.blocks:
            F.linear(normal, block.mixer.in_proj.weight)
            F.linear(inner, block.mixer.out_proj.weight)
        F.linear(normal, model.unembed.weight)

    return run
