"""What the families with gated DeltaNet have in common: its fields, its rows in fused tensors, its MLPs and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Whole
from hooked_mamba.loading.tables import CheckpointError
from hooked_mamba.recurrent_config import DeltaNetConfig


def delta_net(config: Mapping[str, Any], d: int, n: int, eps: float, **more: Any) -> DeltaNetConfig:
    """What shapes a gated DeltaNet whose fields begin with linear_."""
    return DeltaNetConfig(
        d_model=d,
        n_layers=n,
        n_key_heads=common.get(config, "linear_num_key_heads", 16),
        n_value_heads=common.get(config, "linear_num_value_heads", 32),
        key_dim=common.get(config, "linear_key_head_dim", 128),
        value_dim=common.get(config, "linear_value_head_dim", 128),
        d_conv=common.get(config, "linear_conv_kernel_dim", 4),
        norm_eps=eps,
        **more,
    )


def delta_net_of(cfg: HybridConfig) -> DeltaNetConfig:
    """Gated DeltaNet, or the simplest one of a model without it."""
    d = cfg.d_model
    plain = DeltaNetConfig(d_model=d, n_layers=cfg.n_layers, n_key_heads=1, n_value_heads=1, key_dim=d, value_dim=d)
    return cfg.branches.get("mixer", plain)


def delta_fields(cfg: DeltaNetConfig) -> dict[str, Any]:
    """The inverse of :func:`delta_net`."""
    return {
        "linear_num_key_heads": cfg.n_key_heads,
        "linear_num_value_heads": cfg.n_value_heads,
        "linear_key_head_dim": cfg.key_dim,
        "linear_value_head_dim": cfg.value_dim,
        "linear_conv_kernel_dim": cfg.d_conv,
    }


def layer_words(config: Mapping[str, Any], n: int, what: str) -> list[str]:
    """The branches of `layer_types`; without it every fourth layer is attention."""
    words = config.get("layer_types")
    if not words:
        every = common.get(config, "full_attention_interval", 4)
        words = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(n)]
    return common.layer_words(words, what)


def partial_rotary(config: Mapping[str, Any], d_head: int, default: float) -> int:
    """How many numbers of a head turn with the position."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", default))
    return int(d_head * share)


def gated_attention(config: Mapping[str, Any], d: int, n: int, eps: float, what: str) -> Any:
    """Qwen's attention: a gate on its values, norms on queries and keys, positions on a part of each head."""
    d_head = common.get(config, "head_dim", 256)
    return common.attention(
        {**config, "head_dim": d_head},
        d,
        n,
        common.rope_base(config, what),
        rotary_dim=partial_rotary(config, d_head, 0.25),
        qk_norm_eps=eps,
        output_gate=True,
    )


def experts(config: Mapping[str, Any], d: int, n: int) -> dict[str, Any]:
    """The experts and, beside them, one shared by all tokens behind a gate of its own."""
    moe = MoEConfig(
        d_model=d,
        n_layers=n,
        n_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        d_mlp=config["moe_intermediate_size"],
        normalize=bool(common.get(config, "norm_topk_prob", True)),
    )
    width = config["shared_expert_intermediate_size"]
    return {"moe": moe, "shared": MLPConfig(d_model=d, n_layers=n, d_mlp=width, output_gate=True)}


def experts_weights(cfg: Any, theirs: str) -> common.Weights:
    """Experts, the router, and the shared expert with its gate."""
    weights = common.expert_weights("moe", f"{theirs}.experts", cfg.branches["moe"])
    weights |= common.mlp_weights("mlp", f"{theirs}.shared_expert", cfg.branches["shared"])
    return weights | {
        "moe.router.weight": Whole(f"{theirs}.gate.weight"),
        "mlp.output_gate.weight": Whole(f"{theirs}.shared_expert_gate.weight"),
    }


def runs(heads: int, width: int, start: int, size: int) -> tuple[tuple[int, int], ...]:
    """In a tensor of `heads` equal parts of `width` rows: the rows from `start` on of each."""
    return tuple((h * width + start, h * width + start + size) for h in range(heads))


def refuse(config: Mapping[str, Any], what: str) -> None:
    """Refuse what no branch here computes.

    Raises
    ------
    CheckpointError
        Another activation.
    """
    if common.get(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{what} has hidden_act={config['hidden_act']!r}, expected 'silu'")
