"""Hybrids beside transformers: a forward pass, a step and a cache at the shapes of two small published ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from hooked_mamba import HookedHybrid
from hooked_mamba.hybrid_config import AttentionConfig
from hooked_mamba.mixers.attention import Attention
from hooked_mamba.state import Call
from tests.benchmarks.report import Bound, Section, number, relative_error, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race, ratio

FORWARD, STEP, CACHE, FUSED = 1.8, 1.5, 1.3, 3.0
"""Times faster than transformers, forward and step; times a forward that a cache takes; times faster when fused."""


def configs(sizes: Sizes) -> dict[str, Any]:
    """The shapes of Falcon-H1-90M and Granite-4-H-350M; with small sizes, of small ones."""
    full = sizes.claims
    falcon = transformers.FalconH1Config(
        vocab_size=32768 if full else sizes.d_vocab,
        hidden_size=512 if full else 16,
        num_hidden_layers=24 if full else 2,
        num_attention_heads=8 if full else 2,
        num_key_value_heads=2 if full else 1,
        head_dim=64 if full else 8,
        intermediate_size=768 if full else 24,
        mamba_d_ssm=768 if full else 32,
        mamba_n_heads=24 if full else 4,
        mamba_d_head=32 if full else 8,
        mamba_d_state=64 if full else 4,
        mamba_rms_norm=False,
        tie_word_embeddings=True,
    )
    layers = 32 if full else 2
    granite = transformers.GraniteMoeHybridConfig(
        vocab_size=100352 if full else sizes.d_vocab,
        hidden_size=768 if full else 16,
        num_hidden_layers=layers,
        layer_types=["attention" if i in (10, 13, 17, 27) or (not full and i == 1) else "mamba" for i in range(layers)],
        num_attention_heads=12 if full else 2,
        num_key_value_heads=4 if full else 1,
        intermediate_size=2048 if full else 24,
        shared_intermediate_size=2048 if full else 24,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=48 if full else 4,
        mamba_d_head=32 if full else 8,
        mamba_d_state=128 if full else 4,
        mamba_n_groups=1,
        position_embedding_type="nope",
        tie_word_embeddings=True,
    )
    return {"Falcon-H1-90M": falcon, "Granite-4-H-350M": granite}


def run(sizes: Sizes) -> Section:
    """Both models, and attention by its two paths."""
    b, l = sizes.grad_shape
    section = Section(
        "Hybrids",
        f"Random weights at the shapes of Falcon-H1-90M and Granite-4-H-350M, {b} x {l}, the same in both libraries. A"
        " step reads one token behind the prompt. Errors: largest difference of a logit from transformers', by the"
        " largest.",
    )
    for name, config in configs(sizes).items():
        _compare(section, name, config, sizes)
    _paths(section, sizes)
    return section


@torch.no_grad()
def _compare(section: Section, name: str, config: Any, sizes: Sizes) -> None:
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = HookedHybrid.from_hf(hf)
    b, l = sizes.grad_shape
    tokens = torch.randint(3, model.cfg.d_vocab, (b, l))
    error = number(relative_error(model(tokens), hf(tokens).logits.double()))
    runs: dict[str, Callable[[], Any]] = {
        "transformers": lambda: hf(tokens, use_cache=False).logits,
        "ours": lambda: model(tokens),
        "ours, run_with_cache": lambda: model.run_with_cache(tokens),
    }
    timings = race({what: torch.no_grad()(one) for what, one in runs.items()}, sizes)
    extra = {"error": {"ours": error}}
    section.tables.append(timing_table(f"{name}, forward, {b} x {l}", timings, "transformers", extra=extra))

    theirs = hf(tokens, use_cache=True).past_key_values
    mine = [model(tokens, return_state=True)[1]]
    places = itertools.count(l)

    def their_step() -> None:
        hf(tokens[:, :1], past_key_values=theirs, use_cache=True, position_ids=torch.full((b, 1), next(places)))

    def our_step() -> None:
        mine[0] = model(tokens[:, :1], initial_state=mine[0], return_state=True)[1]

    steps = race({"transformers": torch.no_grad()(their_step), "ours": torch.no_grad()(our_step)}, sizes)
    section.tables.append(timing_table(f"{name}, a step behind {l} tokens", steps, "transformers"))
    if sizes.claims:
        section.bounds += [
            Bound(f"{name}, forward", ratio(timings["transformers"], timings["ours"]), FORWARD, True),
            Bound(f"{name}, a step", ratio(steps["transformers"], steps["ours"]), STEP, True),
            Bound(f"{name}, cache", ratio(timings["ours, run_with_cache"], timings["ours"]), CACHE, False),
        ]


@torch.no_grad()
def _paths(section: Section, sizes: Sizes) -> None:
    """Attention without and with its pattern."""
    b, l = sizes.long_shape
    heads = 12 if sizes.claims else 2
    cfg = AttentionConfig(d_model=64 * heads, n_layers=1, n_heads=heads, n_key_value_heads=heads, d_head=64)
    attention = Attention(cfg)
    attention.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(b, l, 64 * heads, generator=torch.Generator().manual_seed(1))
    q = attention.projected("q", x)
    memory = attention(x)[1]

    def materialised() -> Any:
        entry = attention.hook_pattern.add_hook(lambda value, hook: None)
        out = attention.mix(q, memory, Call())
        attention.hook_pattern.fwd_hooks.remove(entry)
        return out

    runs = {"with its pattern": materialised, "fused": lambda: attention.mix(q, memory, Call())}
    error = {"fused": number(relative_error(runs["fused"](), runs["with its pattern"]().double()))}
    timings = race({name: torch.no_grad()(one) for name, one in runs.items()}, sizes)
    title = f"Attention, {heads} heads x 64, {b} x {l}, projections left out"
    section.tables.append(timing_table(title, timings, "with its pattern", extra={"difference": error}))
    if sizes.claims:
        gain = ratio(timings["with its pattern"], timings["fused"])
        section.bounds.append(Bound(f"Attention at {l} positions, fused", gain, FUSED, True))
