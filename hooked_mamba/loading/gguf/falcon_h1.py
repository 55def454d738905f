"""Falcon-H1 in GGUF files: Mamba-2 beside attention, then an MLP.

Its factors are not in the file: the converter multiplies them into weights, so that all factors are 1 here and the
logits are the same, but for one factor where the unembedding is the embedding. Where the mixer has a norm, it comes
behind the gate, as llama.cpp computes it.
"""

from __future__ import annotations

import warnings
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
    normed = common.any_block(state, n, "ssm_norm.weight")
    if normed:
        warnings.warn(
            f"{keys.path} has a norm in each mixer and does not say whether it stands before or behind the gate; it is"
            " read as llama.cpp runs it, behind. Compare with the checkpoint that the file was made from"
            " (mamba_norm_before_gate)",
            stacklevel=2,
        )
    if stack["tie_embeddings"]:
        warnings.warn(
            f"{keys.path} has no output.weight: its unembedding is token_embd.weight, into which the converter"
            " multiplied the embedding's factor and not the unembedding's, and the file names neither. Logits are"
            " llama.cpp's: the checkpoint's times embedding_multiplier / lm_head_multiplier of its config.json",
            stacklevel=2,
        )
    mixer = common.mamba2(
        keys,
        state,
        common.shared_fields(stack),
        gated_norm="gate_first" if normed else "none",
        out_bias=common.any_block(state, n, "ssm_out.bias"),
    )
    attn = common.attention(keys, state, stack, rotary=True)
    mlp = common.mlp(keys, stack, common.neurons(keys, n), bias=common.any_block(state, n, "ffn_up.bias"))
    cfg = HybridConfig(
        **stack,
        branches={"mixer": mixer, "attn": attn, "mlp": mlp},
        layout=((("mixer", "attn"), ("mlp",)),) * n,
        architecture="falcon_h1",
    )
    table = common.stack_weights(cfg.tie_embeddings)
    for i in range(n):
        there = f"blk.{i}"
        weights: common.Weights = {
            "norm.weight": Whole(f"{there}.attn_norm.weight"),
            # The converter leaves the ending out.
            "norm2.weight": (Whole(f"{there}.ffn_norm"), Whole(f"{there}.ffn_norm.weight")),
            **common.mamba2_weights(there, mixer),
            **common.attention_weights(there, attn),
            **common.mlp_weights(there, mlp),
        }
        table |= common.block(weights, i)
    return cfg, read_table(state, table)
