"""Nemotron-H and Nemotron 3 in GGUF files (`nemotron_h`, `nemotron_h_moe`): one sublayer a block.

MLPs and experts are ungated, with relu^2; experts are chosen by a sigmoid and a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading.gguf import common
from hooked_mamba.loading.gguf.keys import Keys
from hooked_mamba.loading.sources import Whole, read_table
from hooked_mamba.loading.tables import LazyState

KINDS = {"ssm_in.weight": "mixer", "attn_q.weight": "attn", "ffn_gate_inp.weight": "moe", "ffn_up.weight": "mlp"}


def to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights under our names.

    Raises
    ------
    CheckpointError
        Groups of experts of which the file does not say how many are chosen.
    """
    keys = Keys(values)
    stack = common.stack(keys, state)
    n = stack["n_layers"]
    words = common.kinds(keys, state, n, KINDS)
    relu2: dict[str, Any] = {"activation": "relu2", "gated": False}
    branches: dict[str, Any] = {}
    if "mixer" in words:
        branches["mixer"] = common.mamba2(keys, state, common.shared_fields(stack))
    if "attn" in words:
        branches["attn"] = common.attention(keys, state, stack, rotary=False)
    if "mlp" in words:
        bias = common.any_block(state, n, "ffn_up.bias")
        branches["mlp"] = common.mlp(keys, stack, common.neurons(keys, n), bias=bias, **relu2)
    if "moe" in words:
        branches["moe"] = common.experts(
            keys, stack, keys.count("expert_feed_forward_length"), **_routing(keys), **relu2
        )
        width = keys.count("expert_shared_feed_forward_length")
        branches["shared"] = common.mlp(keys, stack, width, **relu2)
    cfg = HybridConfig(
        **stack,
        branches=branches,
        layout=tuple((("moe", "mlp=shared") if word == "moe" else (word,),) for word in words),
        architecture="nemotron_h",
    )
    table = common.stack_weights(cfg.tie_embeddings)
    for i, word in enumerate(words):
        table |= common.block(_block(cfg, word, f"blk.{i}"), i)
    return cfg, read_table(state, table)


def _routing(keys: Keys) -> dict[str, Any]:
    groups = keys.count("expert_group_count", 1)
    if groups > 1 and not keys.has("expert_group_used_count"):
        raise keys.fault("expert_group_used_count", f"how many of the {groups} groups of experts are chosen")
    gating = keys.count("expert_gating_func", 2)
    if gating != 2:
        raise keys.fault("expert_gating_func", "2, a sigmoid")
    return {
        "scoring": "sigmoid",
        "normalize": keys.flag("expert_weights_norm", True),
        "routed_scale": keys.number("expert_weights_scale", 1.0),
        "correction_bias": True,
        "n_groups": groups,
        "top_k_groups": keys.count("expert_group_used_count", 1),
        "d_latent": keys.count("moe_latent_size") if keys.has("moe_latent_size") else None,
    }


def _block(cfg: HybridConfig, word: str, there: str) -> common.Weights:
    weights: common.Weights = {"norm.weight": Whole(f"{there}.attn_norm.weight")}
    if word == "mixer":
        return weights | common.mamba2_weights(there, cfg.branches["mixer"])
    if word == "attn":
        return weights | common.attention_weights(there, cfg.branches["attn"])
    if word == "mlp":
        return weights | common.mlp_weights(there, cfg.branches["mlp"])
    moe = cfg.branches["moe"]
    weights |= common.expert_weights(there, moe) | common.mlp_weights(there, cfg.branches["shared"], "_shexp")
    weights["moe.correction_bias"] = Whole(f"{there}.exp_probs_b.bias")
    if moe.d_latent is not None:
        weights["moe.latent_in.weight"] = Whole(f"{there}.ffn_latent_down.weight")
        weights["moe.latent_out.weight"] = Whole(f"{there}.ffn_latent_up.weight")
    return weights
