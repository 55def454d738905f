"""The models that can be trained here, with random weights."""

from __future__ import annotations

import math
from typing import Any

from demos.tinystories.options import Options
from hooked_mamba import HookedHybrid, HookedMamba, HookedMamba2, HookedModel, HookedRWKV7, Mamba2Config, MambaConfig
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.recurrent_config import RWKV7Config

LETTERS = {"M": "mixer", "*": "attn"}
"""A letter of `--pattern` -> the first branch of its block."""


def build_model(options: Options, tokenizer: Any) -> HookedModel:
    """A model with random weights drawn from the run's seed."""
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    size = {"d_model": options.d_model, "n_layers": options.n_layers}
    shape = {**size, "d_vocab": math.ceil(len(tokenizer) / 16) * 16, "model_name": options.name, **ids}
    if options.family == "mamba":
        cfg = MambaConfig(d_state=options.d_state or 16, **shape)
        return HookedMamba(cfg, tokenizer, seed=options.seed)
    if options.family == "rwkv7":
        ranks = {"decay_rank": 32, "rate_rank": 32, "value_rank": 32, "gate_rank": 64}  # what RWKV-LM has at this width
        heads = {"head_dim": options.head_dim, "d_mlp": options.d_mlp, "tie_embeddings": True}
        return HookedRWKV7(RWKV7Config(**shape, **ranks, **heads), tokenizer, seed=options.seed)
    cfg2 = Mamba2Config(d_state=options.d_state or 64, head_dim=options.head_dim, **shape)
    if options.family == "mamba2":
        return HookedMamba2(cfg2, tokenizer, seed=options.seed)
    return HookedHybrid(hybrid_config(options, cfg2, size, shape), tokenizer, seed=options.seed)


def hybrid_config(options: Options, mixer: Mamba2Config, size: dict[str, int], shape: dict[str, Any]) -> HybridConfig:
    """Blocks as in Granite 4: Mamba-2 or attention, then experts and an MLP side by side; no positions, tied."""
    branches = {
        "mixer": mixer,
        "attn": AttentionConfig(
            **size, n_heads=options.n_heads, n_key_value_heads=options.n_kv_heads, d_head=options.d_head
        ),
        "mlp": MLPConfig(**size, d_mlp=options.d_mlp or options.d_model),
        "moe": MoEConfig(
            **size,
            n_experts=options.n_experts,
            top_k=options.top_k,
            d_mlp=options.d_expert,
            scoring="top_k_softmax",
        ),
    }
    return HybridConfig(
        **shape,
        branches=branches,
        layout=tuple(((LETTERS[letter],), ("moe", "mlp")) for letter in options.pattern),
        tie_embeddings=True,
        architecture="granitemoehybrid",
    )
