"""Granite 4 and Bamba in GGUF files, both of the architecture `granitehybrid`.

Rows of queries and keys were reordered by the converter. Bamba is told by `rope.scaling.finetuned`, by which llama.cpp
turns queries and keys with the position, Bamba the first half of each head; Granite 4 has no positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading.gguf import common
from hooked_mamba.loading.gguf.keys import Keys
from hooked_mamba.loading.sources import Whole, read_table
from hooked_mamba.loading.tables import LazyState


def to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights under our names."""
    keys = Keys(values)
    stack = common.stack(keys, state)
    n = stack["n_layers"]
    turned = keys.flag("rope.scaling.finetuned", False)
    words = common.kinds(keys, state, n, {"attn_q.weight": "attn", "ssm_in.weight": "mixer"})
    routed = common.any_block(state, n, "ffn_gate_inp.weight")
    branches: dict[str, Any] = {}
    if "mixer" in words:
        branches["mixer"] = common.mamba2(keys, state, common.shared_fields(stack))
    if "attn" in words:
        attn = common.attention(keys, state, stack, rotary=turned)
        scale = keys.number("attention.scale") if keys.has("attention.scale") else None
        half = attn.d_head // 2 if turned else 0  # of each head, whatever the file's rope.dimension_count is
        branches["attn"] = dataclasses.replace(attn, scale=scale, rotary_dim=half)
    # Without experts the key says how wide they would be.
    dense = None if routed else common.shape_of(state, keys, "blk.0.ffn_gate.weight", 2)[0]
    branches["mlp"] = common.mlp(keys, stack, dense or keys.count("expert_shared_feed_forward_length"))
    if routed:
        branches["moe"] = common.experts(keys, stack, common.neurons(keys, n), scoring="top_k_softmax")
    factor = keys.number("residual_scale", 1.0)
    second = ("moe", "mlp") if routed else ("mlp",)
    cfg = HybridConfig(
        **stack,
        branches=branches,
        layout=tuple(((word,), second) for word in words),
        out_scales=dict.fromkeys(branches, factor) if factor != 1 else {},
        embedding_multiplier=keys.number("embedding_scale", 1.0),
        logit_multiplier=1 / keys.number("logit_scale", 1.0),
        architecture="bamba" if turned else "granitemoehybrid",
    )
    table = common.stack_weights(cfg.tie_embeddings)
    for i, word in enumerate(words):
        table |= common.block(_block(cfg, word, f"blk.{i}"), i)
    return cfg, read_table(state, table)


def _block(cfg: HybridConfig, word: str, there: str) -> common.Weights:
    weights: common.Weights = {
        "norm.weight": Whole(f"{there}.attn_norm.weight"),
        "norm2.weight": Whole(f"{there}.ffn_norm.weight"),
    }
    if word == "attn":
        weights |= common.attention_weights(there, cfg.branches["attn"], paired=True)
    else:
        weights |= common.mamba2_weights(there, cfg.branches["mixer"])
    if "moe" in cfg.branches:
        weights |= common.expert_weights(there, cfg.branches["moe"])
        return weights | common.mlp_weights(there, cfg.branches["mlp"], "_shexp")
    return weights | common.mlp_weights(there, cfg.branches["mlp"])
