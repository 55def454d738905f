"""Tiny models of the delta rule and of Mamba-3, in float64, every weight drawn away from its usual value."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from hooked_mamba import HookedHybrid, HookedRWKV7
from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.recurrent_config import DeltaNetConfig, Mamba3Config, Mamba3MIMOConfig, RWKV7Config
from tests.hooked_mamba.recurrent import oracle
from tests.hooked_mamba.tiny import arrays

KINDS = ("rwkv7", "deltanet", "deltanet-bare", "deltanet-sigmoid")
"""RWKV-7; gated DeltaNet as in Qwen3-Next; without convolution and gate, beta to 2; with a sigmoid, biases, 3 taps."""

DELTANETS = {
    "deltanet": {},
    "deltanet-bare": {"d_conv": 0, "gate": "none", "negative_eigenvalues": True},
    "deltanet-sigmoid": {"d_conv": 3, "gate": "sigmoid", "conv_bias": True, "n_key_heads": 4},
}


MAMBA3 = {
    "mamba3": {"A_act": "softplus", "n_groups": 2, "norm_of_heads": True, "use_bias": True},
    "mamba3-bare": {"A_act": "heavy_tail", "rope_fraction": 1.0},
    "mamba3-mimo": {"A_act": "softplus", "n_groups": 2, "mimo_rank": 3, "norm_of_heads": True},
    "mamba3-mimo-bare": {"A_act": "heavy_tail", "mimo_rank": 2},
}
"""Mamba-3 with single inputs and outputs, and with several."""

SLOW = ("deltanet-bare", "deltanet-sigmoid", "mamba3-bare", "mamba3-mimo-bare")
LINEAR = tuple(pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in (*KINDS, *MAMBA3))
"""What linear forms are tested on: some of them by default."""


def config(kind: str, n_layers: int = 2) -> RWKV7Config | HybridConfig:
    """Odd little sizes, so that no axis can pass for another."""
    if kind == "rwkv7":
        ranks = {"decay_rank": 5, "rate_rank": 2, "value_rank": 3, "gate_rank": 6}
        return RWKV7Config(d_model=12, n_layers=n_layers, d_vocab=17, head_dim=4, d_mlp=11, **ranks)
    if kind in MAMBA3:
        stack = {"d_model": 6, "n_layers": n_layers}
        fields = stack | {"d_state": 4, "head_dim": 3} | MAMBA3[kind]
        mixer = (Mamba3MIMOConfig if "mimo_rank" in fields else Mamba3Config)(**fields)
        branches, layout = {"mixer": mixer}, ((("mixer",),),) * n_layers
        return HybridConfig(**stack, d_vocab=17, tie_embeddings=False, branches=branches, layout=layout)
    stack = {"d_model": 7, "n_layers": n_layers}
    heads = {"n_key_heads": 2, "n_value_heads": 4, "key_dim": 5, "value_dim": 3}
    return HybridConfig(
        **stack,
        d_vocab=17,
        tie_embeddings=False,
        branches={
            "mixer": DeltaNetConfig(**stack, **(heads | DELTANETS[kind])),
            "mlp": MLPConfig(**stack, d_mlp=8),
        },
        layout=((("mixer",), ("mlp",)),) * n_layers,
    )


@torch.no_grad()
def build(kind: str, seed: int = 0, n_layers: int = 2, mlp: bool = True):
    """A float64 model in evaluation mode."""
    cfg = config(kind, n_layers)
    if not mlp:
        branches = {"mixer": cfg.branches["mixer"]}
        cfg = dataclasses.replace(cfg, branches=branches, layout=((("mixer",),),) * n_layers)
    model = (HookedRWKV7 if kind == "rwkv7" else HookedHybrid)(cfg, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if name == "embed.weight":
            p.copy_(noise)
        else:
            p.add_(noise * 0.4)
    return model.eval().requires_grad_(False)


@functools.lru_cache(maxsize=len(LINEAR))
def model_of(kind: str):
    """One model a kind; every test leaves it without hooks."""
    return build(kind)


@functools.lru_cache(maxsize=len(LINEAR))
def bare(kind: str):
    """One model a kind for linear forms: gated DeltaNet's blocks have nothing but the mixer."""
    return build(kind, mlp=kind not in DELTANETS)


def tokens_for(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, 17, (rows, length), generator=torch.Generator().manual_seed(seed))


def equations(model, tokens: Tensor, edits=None, memory=None, wrong: str = "", **changes) -> oracle.Pass:
    """The oracle's pass of the same weights."""
    run = oracle.rwkv7 if model.family == "rwkv7" else oracle.deltanet
    return run(model.cfg, arrays(model.state_dict()) | changes, tokens.numpy(), edits, memory, wrong)


def everything(model, tokens: Tensor, **kwargs):
    """Logits and every site, single states included."""
    states = [f"blocks.{i}.mixer.hook_h.{t}" for i in range(model.cfg.n_layers) for t in range(tokens.shape[1])]
    return model.run_with_cache(tokens, names_filter=[*model.hook_dict, *states], **kwargs)
