"""Falcon-H1 (arXiv:2507.22448; transformers' `falcon_h1`): Mamba-2 and attention side by side, then an MLP.

Factors multiply what each branch reads and adds, the keys, the parts of in_proj's output and the gate of the MLP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Table, Whole, write_table
from hooked_mamba.loading.tables import LazyState, reject

WHAT = "this Falcon-H1 config"


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

    def factor(name: str) -> float:
        return float(common.get(config, name, 1.0))

    gate, down = map(float, common.get(config, "mlp_multipliers", (1.0, 1.0)))
    d_ssm = common.get(config, "mamba_d_ssm", common.get(config, "mamba_expand", 2) * d)
    norm_first = bool(common.get(config, "mamba_norm_before_gate", True))
    gated_norm = "norm_first" if norm_first else "gate_first"
    mixer = common.mamba2(
        config,
        stack,
        d_ssm,
        use_bias=bool(common.get(config, "mamba_proj_bias", False)),
        out_bias=bool(common.get(config, "projectors_bias", False)),
        gated_norm=gated_norm if common.get(config, "mamba_rms_norm", False) else "none",
        in_scales=tuple(map(float, common.get(config, "ssm_multipliers", (1.0,) * 5))),
    )
    attn = common.attention(
        config, d, n, common.rope_base(config, WHAT, 10000.0), key_multiplier=factor("key_multiplier")
    )
    mlp = MLPConfig(
        d_model=d,
        n_layers=n,
        d_mlp=config["intermediate_size"],
        bias=bool(common.get(config, "mlp_bias", False)),
        gate_multiplier=gate,
    )
    return HybridConfig(
        **stack,
        branches={"mixer": mixer, "attn": attn, "mlp": mlp},
        layout=((("mixer", "attn"), ("mlp",)),) * n,
        in_scales={"mixer": factor("ssm_in_multiplier"), "attn": factor("attention_in_multiplier")},
        out_scales={
            "mixer": factor("ssm_out_multiplier"),
            "attn": factor("attention_out_multiplier"),
            "mlp": down,
        },
        embedding_multiplier=factor("embedding_multiplier"),
        logit_multiplier=factor("lm_head_multiplier"),
        architecture="falcon_h1",
        extra=common.kept(config),
    )


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embed_tokens", "final_layernorm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    return {
        "norm.weight": Whole(f"{theirs}.input_layernorm.weight"),
        "norm2.weight": Whole(f"{theirs}.pre_ff_layernorm.weight"),
        **common.mamba2_weights("mixer", f"{theirs}.mamba", cfg.branches["mixer"]),
        **common.attention_weights("attn", f"{theirs}.self_attn", cfg.branches["attn"]),
        **common.mlp_weights("mlp", f"{theirs}.feed_forward", cfg.branches["mlp"]),
    }


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which may merge tensors."""
    mixer, attn, mlp = cfg.branches["mixer"], cfg.branches["attn"], cfg.branches["mlp"]
    config = common.stack_config(cfg) | common.attention_fields(attn) | common.mamba2_fields(mixer)
    config |= {
        "rms_norm_eps": cfg.eps,
        "head_dim": attn.d_head,
        "intermediate_size": mlp.d_mlp,
        "mlp_bias": mlp.bias,
        "projectors_bias": mixer.has_out_bias,
        "mamba_d_ssm": mixer.E,
        "mamba_rms_norm": mixer.gated_norm != "none",
        "mamba_norm_before_gate": mixer.gated_norm == "norm_first",
        "ssm_multipliers": list(mixer.in_scales or (1.0,) * 5),
        "ssm_in_multiplier": cfg.in_scales.get("mixer", 1.0),
        "ssm_out_multiplier": cfg.out_scales.get("mixer", 1.0),
        "attention_in_multiplier": cfg.in_scales.get("attn", 1.0),
        "attention_out_multiplier": cfg.out_scales.get("attn", 1.0),
        "key_multiplier": attn.key_multiplier,
        "mlp_multipliers": [mlp.gate_multiplier, cfg.out_scales.get("mlp", 1.0)],
        "embedding_multiplier": cfg.embedding_multiplier,
        "lm_head_multiplier": cfg.logit_multiplier,
        "hidden_act": "silu",
        "architectures": ["FalconH1ForCausalLM"],
    }
    return config, write_table(state, table(cfg, "model."), names)
