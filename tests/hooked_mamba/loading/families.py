"""Tiny random models of every family that files of other formats hold, saved as transformers saves them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import transformers

from hooked_mamba import HookedRWKV7
from hooked_mamba.recurrent_config import RWKV7Config
from tests.hooked_mamba.hybrids import tiny
from tests.hooked_mamba.recurrent import test_deltanet_families as deltanet

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}


def _model(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**(SMALL | fields))
    return tiny.randomize(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def _nemotron(**fields: Any) -> Any:
    return tiny.twin("nemotron", **fields)


def _rwkv7() -> Any:
    ranks = dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), 6)
    cfg = RWKV7Config(d_model=32, n_layers=3, d_vocab=61, head_dim=8, d_mlp=48, **ranks)
    model = HookedRWKV7(cfg, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def _qwen(case: str) -> Any:
    name, fields = deltanet.CASES[case]
    everywhere = {"mlp_only_layers": []} if case == "qwen3_next" else {}  # experts, in every layer
    with mock.patch.dict(deltanet.CASES, {case: (name, fields | everywhere)}):
        return deltanet.theirs(case).float()


CASES = {
    "mamba": lambda: _model("Mamba", time_step_rank=5),
    "mamba-bias": lambda: _model("Mamba", time_step_rank=5, use_bias=True, use_conv_bias=False),
    "falcon-mamba": lambda: _model("FalconMamba", time_step_rank=5, tie_word_embeddings=False),
    "mamba2": lambda: _model("Mamba2", num_heads=8, head_dim=8, n_groups=2),
    "jamba": lambda: tiny.twin("jamba"),
    "bamba": lambda: tiny.twin("bamba"),
    "granite-moe": lambda: tiny.twin("granite-moe"),
    "granite-dense": lambda: tiny.twin("granite-dense", position_embedding_type="nope"),
    "nemotron-moe": lambda: _nemotron(layers_block_type=["mamba", "moe", "attention", "moe", "mamba"]),
    "nemotron": lambda: _nemotron(layers_block_type=["mamba", "mlp", "attention", "mlp", "mamba"]),
    "falcon-h1": lambda: tiny.twin("falcon"),
    "falcon-h1-norm": lambda: tiny.twin("falcon-gate-first"),
    "lfm2": lambda: tiny.twin("lfm2"),
    "rwkv7": _rwkv7,
    "qwen3-next": lambda: _qwen("qwen3_next"),
    "qwen3.5": lambda: _qwen("qwen3_5"),
    "qwen3.5-moe": lambda: _qwen("qwen3_5_moe"),
}
"""Name -> what makes the model; each has `save_pretrained`."""

FAMILY = {
    "falcon-mamba": "Falcon-Mamba",
    "mamba2": "Mamba-2",
    "granite": "Granite 4 H",
    "nemotron": "Nemotron-H",
    "falcon-h1": "Falcon-H1",
    "lfm2": "LFM2",
    "rwkv7": "RWKV-7",
    "qwen3-next": "Qwen3-Next",
    "qwen3.5": "Qwen3.5",
    "jamba": "Jamba",
    "bamba": "Bamba",
    "mamba": "Mamba",
}
"""First part of a name -> the family in the table of docs/loading.md."""


def family(case: str) -> str:
    """The family of a name of CASES, as the table of docs/loading.md has it."""
    return next(there for part, there in FAMILY.items() if case.startswith(part))
