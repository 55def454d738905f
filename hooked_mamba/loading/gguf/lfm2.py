"""LFM2 in GGUF files: a gated short convolution or attention, then a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, ShortConvConfig
from hooked_mamba.loading.gguf import common
from hooked_mamba.loading.gguf.keys import Keys
from hooked_mamba.loading.gguf.sources import Shaped
from hooked_mamba.loading.sources import Whole, read_table
from hooked_mamba.loading.tables import LazyState


def to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights under our names."""
    keys = Keys(values)
    stack = common.stack(keys, state)
    d, n = stack["d_model"], stack["n_layers"]
    words = common.kinds(keys, state, n, {"attn_q.weight": "attn", "shortconv.in_proj.weight": "mixer"})
    conv = ShortConvConfig(
        d_model=d,
        n_layers=n,
        d_conv=keys.count("shortconv.l_cache"),
        bias=common.any_block(state, n, "shortconv.conv.bias"),
    )
    branches: dict[str, Any] = {"mixer": conv, "mlp": common.mlp(keys, stack, common.neurons(keys, n))}
    if "attn" in words:
        branches["attn"] = common.attention(keys, state, stack, rotary=True, qk_norm_eps=stack["eps"])
    cfg = HybridConfig(
        **stack, branches=branches, layout=tuple(((word,), ("mlp",)) for word in words), architecture="lfm2"
    )
    norm = "token_embd_norm" if "token_embd_norm.weight" in state else "output_norm"
    table = common.stack_weights(cfg.tie_embeddings, norm)
    for i, word in enumerate(words):
        there = f"blk.{i}"
        weights: common.Weights = {
            "norm.weight": Whole(f"{there}.attn_norm.weight"),
            "norm2.weight": Whole(f"{there}.ffn_norm.weight"),
            **common.mlp_weights(there, cfg.branches["mlp"]),
        }
        if word == "attn":
            weights |= common.attention_weights(there, cfg.branches["attn"])
            weights |= {f"attn.{p}_norm_weight": Whole(f"{there}.attn_{p}_norm.weight") for p in "qk"}
        else:
            weights |= _conv(f"{there}.shortconv", conv)
        table |= common.block(weights, i)
    return cfg, read_table(state, table)


def _conv(there: str, cfg: ShortConvConfig) -> common.Weights:
    weights: common.Weights = {
        "mixer.in_proj.weight": Whole(f"{there}.in_proj.weight"),
        "mixer.conv1d.weight": Shaped(f"{there}.conv.weight", (cfg.d_model, 1, cfg.d_conv)),
        "mixer.out_proj.weight": Whole(f"{there}.out_proj.weight"),
    }
    if cfg.bias:
        weights |= {f"mixer.{name}.bias": Whole(f"{there}.{name}.bias") for name in ("in_proj", "out_proj")}
        weights["mixer.conv1d.bias"] = Whole(f"{there}.conv.bias")
    return weights
