"""Granite 4 (transformers' `granitemoehybrid`): Mamba-2 or attention, then a shared MLP and, beside it, experts.

A factor multiplies the embedding, every addition to the stream and the scores; the logits are divided by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Rows, Table, Whole, write_table
from hooked_mamba.loading.tables import LazyState, reject

WHAT = "this Granite config"


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), WHAT)
    reject(config, {"hidden_act": ("silu",), "position_embedding_type": (None, "rope", "nope")}, WHAT)
    stack = common.stack_fields(config, common.get(config, "rms_norm_eps", 1e-6))
    d, n = stack["d_model"], stack["n_layers"]
    rope = common.rope_base(config, WHAT) if config.get("position_embedding_type") == "rope" else None
    experts = common.get(config, "num_local_experts", 8 if "num_local_experts" not in config else 0)
    words = common.get(config, "layer_types", None) or common.get(config, "layers_block_type", ["mamba"] * n)
    branches: dict[str, Any] = {
        "mixer": common.mamba2(config, stack, common.get(config, "mamba_expand", 2) * d),
        "attn": common.attention(config, d, n, rope, scale=float(common.get(config, "attention_multiplier", 1.0))),
        "mlp": MLPConfig(d_model=d, n_layers=n, d_mlp=common.get(config, "shared_intermediate_size", 1024)),
    }
    if experts:
        branches["moe"] = MoEConfig(
            d_model=d,
            n_layers=n,
            n_experts=experts,
            top_k=common.get(config, "num_experts_per_tok", 2),
            d_mlp=config["intermediate_size"],
            scoring="top_k_softmax",
        )
    second = ("moe", "mlp") if experts else ("mlp",)
    factor = float(common.get(config, "residual_multiplier", 1.0))
    return HybridConfig(
        **stack,
        branches=branches,
        layout=tuple(((word,), second) for word in common.layer_words(words, WHAT)),
        out_scales=dict.fromkeys(branches, factor) if factor != 1 else {},
        embedding_multiplier=float(common.get(config, "embedding_multiplier", 1.0)),
        logit_multiplier=1 / float(common.get(config, "logits_scaling", 1.0)),
        architecture="granitemoehybrid",
        extra=common.kept(config),
    )


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embed_tokens", "norm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    weights: common.Weights = {
        "norm.weight": Whole(f"{theirs}.input_layernorm.weight"),
        "norm2.weight": Whole(f"{theirs}.post_attention_layernorm.weight"),
    }
    if "attn" in cfg.layout[i][0]:
        weights |= common.attention_weights("attn", f"{theirs}.self_attn", cfg.branches["attn"])
    else:
        weights |= common.mamba2_weights("mixer", f"{theirs}.mamba", cfg.branches["mixer"])
    weights |= _fused_mlp("mlp", f"{theirs}.shared_mlp", cfg.branches["mlp"].d_mlp)
    if "moe" in cfg.branches:
        moe, there = cfg.branches["moe"], f"{theirs}.block_sparse_moe"
        F = moe.d_mlp
        weights["moe.router.weight"] = (Whole(f"{there}.router.layer.weight"), Whole(f"{there}.router.weight"))
        fused = [f"{there}.input_linear.weight", f"{there}.experts.gate_up_proj"]
        weights["moe.gate_proj"] = tuple(Rows(name, 0, F, axis=1) for name in fused)
        weights["moe.up_proj"] = tuple(Rows(name, F, 2 * F, axis=1) for name in fused)
        weights["moe.down_proj"] = (Whole(f"{there}.output_linear.weight"), Whole(f"{there}.experts.down_proj"))
    return weights


def _fused_mlp(ours: str, theirs: str, F: int) -> common.Weights:
    fused = f"{theirs}.input_linear.weight"
    return {
        f"{ours}.gate_proj.weight": Rows(fused, 0, F),
        f"{ours}.up_proj.weight": Rows(fused, F, 2 * F),
        f"{ours}.down_proj.weight": Whole(f"{theirs}.output_linear.weight"),
    }


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which may merge tensors."""
    mixer, attn, mlp = common.mamba2_of(cfg), common.attention_of(cfg), cfg.branches["mlp"]
    moe = cfg.branches.get("moe")
    config = common.stack_config(cfg) | common.attention_fields(attn) | common.mamba2_fields(mixer)
    words = {"mixer": "mamba", "attn": "attention"}
    config |= {
        "rms_norm_eps": cfg.eps,
        "shared_intermediate_size": mlp.d_mlp,
        "mamba_expand": common.whole_multiple(mixer),
        "layer_types": [words[block[0][0]] for block in cfg.layout],
        "attention_multiplier": attn.score_scale,
        "embedding_multiplier": cfg.embedding_multiplier,
        "residual_multiplier": cfg.out_scales.get("mlp", 1.0),
        "logits_scaling": 1 / cfg.logit_multiplier,
        "position_embedding_type": "rope" if attn.rotary_dim else "nope",
        "num_local_experts": 0 if moe is None else moe.n_experts,
        "num_experts_per_tok": 0 if moe is None else moe.top_k,
        "intermediate_size": mlp.d_mlp if moe is None else moe.d_mlp,
        "hidden_act": "silu",
        "architectures": ["GraniteMoeHybridForCausalLM"],
    }
    return config, write_table(state, table(cfg, "model."), names)
