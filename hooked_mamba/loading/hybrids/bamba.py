"""Bamba (transformers' `bamba`): Mamba-2 or attention, then a gated MLP, in every block.

Positions turn the first half of each head, whatever the config says: so the published code has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Table, Whole, write_table
from hooked_mamba.loading.tables import LazyState, reject

WHAT = "this Bamba config"


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), WHAT)
    reject(config, {"hidden_act": ("silu",)}, WHAT)
    stack = common.stack_fields(config, common.get(config, "rms_norm_eps", 1e-5))
    d, n = stack["d_model"], stack["n_layers"]
    base = common.rope_base(config, WHAT)
    attn = common.attention(config, d, n, None)
    attn = common.attention(config, d, n, None, rotary_dim=attn.d_head // 2, rotary_base=base)
    bias = bool(common.get(config, "mlp_bias", False))
    attends = set(common.get(config, "attn_layer_indices", ()))
    return HybridConfig(
        **stack,
        branches={
            "mixer": common.mamba2(config, stack, common.get(config, "mamba_expand", 2) * d),
            "attn": attn,
            "mlp": MLPConfig(
                d_model=d,
                n_layers=n,
                d_mlp=config["intermediate_size"],
                bias=bias,
            ),
        },
        layout=tuple(((("attn",) if i in attends else ("mixer",)), ("mlp",)) for i in range(n)),
        architecture="bamba",
        extra=common.kept(config),
    )


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embed_tokens", "final_layernorm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    weights: common.Weights = {
        "norm.weight": Whole(f"{theirs}.input_layernorm.weight"),
        "norm2.weight": Whole(f"{theirs}.pre_ff_layernorm.weight"),
    }
    if "attn" in cfg.layout[i][0]:
        weights |= common.attention_weights("attn", f"{theirs}.self_attn", cfg.branches["attn"])
    else:
        weights |= common.mamba2_weights("mixer", f"{theirs}.mamba", cfg.branches["mixer"])
    return weights | common.mlp_weights("mlp", f"{theirs}.feed_forward", cfg.branches["mlp"])


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which may merge tensors."""
    mixer, attn, mlp = common.mamba2_of(cfg), common.attention_of(cfg), cfg.branches["mlp"]
    config = common.stack_config(cfg) | common.attention_fields(attn) | common.mamba2_fields(mixer)
    config |= {
        "rms_norm_eps": cfg.eps,
        "intermediate_size": mlp.d_mlp,
        "mlp_bias": mlp.bias,
        "mamba_expand": common.whole_multiple(mixer),
        "attn_layer_indices": [i for i, block in enumerate(cfg.layout) if "attn" in block[0]],
        "hidden_act": "silu",
        "architectures": ["BambaForCausalLM"],
    }
    return config, write_table(state, table(cfg, "model."), names)
