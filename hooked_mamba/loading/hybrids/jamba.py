"""Jamba (arXiv:2403.19887; transformers' `jamba`): Mamba-1 with its own norms or attention, then an MLP or experts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import MambaConfig
from hooked_mamba.hybrid_config import HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Table, Whole, write_table
from hooked_mamba.loading.tables import CheckpointError, LazyState, reject

WHAT = "this Jamba config"


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), WHAT)
    reject(config, {"hidden_act": ("silu",)}, WHAT)
    stack = common.stack_fields(config, common.get(config, "rms_norm_eps", 1e-6))
    d, n = stack["d_model"], stack["n_layers"]
    rank, d_mlp = common.get(config, "mamba_dt_rank", "auto"), config["intermediate_size"]
    mixer = MambaConfig(
        **{name: stack[name] for name in ("d_model", "n_layers", "d_vocab", "eps")},
        d_state=common.get(config, "mamba_d_state", 16),
        d_conv=common.get(config, "mamba_d_conv", 4),
        expand=common.get(config, "mamba_expand", 2),
        dt_rank=math.ceil(d / 16) if rank == "auto" else rank,
        conv_bias=bool(common.get(config, "mamba_conv_bias", True)),
        use_bias=bool(common.get(config, "mamba_proj_bias", False)),
        mixer_norms=True,
        mixer_norm_weights=True,
        mixer_norm_eps=stack["eps"],
    )
    experts, top_k = common.get(config, "num_experts", 16), common.get(config, "num_experts_per_tok", 2)
    period, offset = common.get(config, "attn_layer_period", 8), common.get(config, "attn_layer_offset", 4)
    routed = (common.get(config, "expert_layer_period", 2), common.get(config, "expert_layer_offset", 1))

    def stages(i: int) -> tuple[tuple[str, ...], ...]:
        second = "moe" if experts > 1 and i % routed[0] == routed[1] else "mlp"
        return (("attn" if i % period == offset else "mixer",), (second,))

    branches: dict[str, Any] = {
        "mixer": mixer,
        "attn": common.attention(config, d, n, None),
        "mlp": MLPConfig(d_model=d, n_layers=n, d_mlp=d_mlp),
    }
    if experts > 1:
        branches["moe"] = MoEConfig(d_model=d, n_layers=n, n_experts=experts, top_k=top_k, d_mlp=d_mlp)
    return HybridConfig(
        **stack,
        branches=branches,
        layout=tuple(stages(i) for i in range(n)),
        architecture="jamba",
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
    first, second = cfg.layout[i]
    if "attn" in first:
        weights |= common.attention_weights("attn", f"{theirs}.self_attn", cfg.branches["attn"])
    else:
        mixer, there = cfg.branches["mixer"], f"{theirs}.mamba"
        weights |= common.mamba_weights("mixer", there, mixer.use_bias, mixer.conv_bias)
        names = ("x_proj.weight", "dt_proj.weight", "dt_proj.bias")
        weights |= {f"mixer.{name}": Whole(f"{there}.{name}") for name in names}
        weights |= {f"mixer.{v}_norm_weight": Whole(f"{there}.{v.lower()}_layernorm.weight") for v in ("dt", "B", "C")}
    there = f"{theirs}.feed_forward"
    if "moe" in second:
        weights["moe.router.weight"] = Whole(f"{there}.router.weight")
        return weights | common.expert_weights("moe", f"{there}.experts", cfg.branches["moe"])
    return weights | common.mlp_weights("mlp", there, cfg.branches["mlp"])


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which may merge tensors.

    Raises
    ------
    CheckpointError
        A layout that no period and offset describe.
    """
    mixer, attn, mlp = cfg.branches["mixer"], common.attention_of(cfg), cfg.branches["mlp"]
    moe = cfg.branches.get("moe")
    attn_period, attn_offset = _period([i for i, block in enumerate(cfg.layout) if "attn" in block[0]], cfg.n_layers)
    moe_period, moe_offset = _period([i for i, block in enumerate(cfg.layout) if "moe" in block[1]], cfg.n_layers)
    config = common.stack_config(cfg) | common.attention_fields(attn)
    del config["attention_bias"]
    config |= {
        "rms_norm_eps": cfg.eps,
        "intermediate_size": mlp.d_mlp,
        "attn_layer_period": attn_period,
        "attn_layer_offset": attn_offset,
        "expert_layer_period": moe_period,
        "expert_layer_offset": moe_offset,
        "num_experts": 1 if moe is None else moe.n_experts,
        "num_experts_per_tok": 1 if moe is None else moe.top_k,
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": common.whole_multiple(mixer),
        "mamba_dt_rank": mixer.R,
        "mamba_conv_bias": mixer.conv_bias,
        "mamba_proj_bias": mixer.use_bias,
        "hidden_act": "silu",
        "architectures": ["JambaForCausalLM"],
    }
    return config, write_table(state, table(cfg, "model."), names)


def _period(layers: list[int], n: int) -> tuple[int, int]:
    """(period, offset) of the layers that have something."""
    for period in range(1, n + 2):
        for offset in range(period):
            if [i for i in range(n) if i % period == offset] == layers:
                return period, offset
    raise CheckpointError(f"Jamba's config says where layers stand by a period and an offset, which {layers} have not")
