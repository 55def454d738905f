"""Jamba in GGUF files: Mamba-1 with norms on dt, B and C, or attention; then an MLP, or experts."""

from __future__ import annotations

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
    norms = {"mixer_norms": True, "mixer_norm_weights": True, "mixer_norm_eps": stack["eps"]}
    first = common.kinds(keys, state, n, {"attn_q.weight": "attn", "ssm_in.weight": "mixer"})
    second = common.kinds(keys, state, n, {"ffn_gate_inp.weight": "moe", "ffn_gate.weight": "mlp"})
    width = common.neurons(keys, n)
    branches: dict[str, Any] = {
        "mixer": common.mamba(keys, state, common.shared_fields(stack), **norms),
        "mlp": common.mlp(keys, stack, width),
    }
    if "attn" in first:
        branches["attn"] = common.attention(keys, state, stack, rotary=False)
    if "moe" in second:
        branches["moe"] = common.experts(keys, stack, width)
    layout = tuple(((one,), (other,)) for one, other in zip(first, second, strict=True))
    cfg = HybridConfig(**stack, branches=branches, layout=layout, architecture="jamba")
    table = common.stack_weights(cfg.tie_embeddings)
    for i in range(n):
        table |= common.block(_block(cfg, i, f"blk.{i}"), i)
    return cfg, read_table(state, table)


def _block(cfg: HybridConfig, i: int, there: str) -> common.Weights:
    (first,), (second,) = cfg.layout[i]
    weights: common.Weights = {
        "norm.weight": Whole(f"{there}.attn_norm.weight"),
        "norm2.weight": Whole(f"{there}.ffn_norm.weight"),
    }
    if first == "attn":
        weights |= common.attention_weights(there, cfg.branches["attn"])
    else:
        weights |= common.mamba_weights(there, cfg.branches["mixer"])
    if second == "moe":
        return weights | common.expert_weights(there, cfg.branches["moe"])
    return weights | common.mlp_weights(there, cfg.branches["mlp"])
