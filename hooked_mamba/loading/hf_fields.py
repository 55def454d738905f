"""What the three Hugging Face families have in common (transformers' MambaConfig and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import SSMConfig
from hooked_mamba.loading.tables import CheckpointError, Field, reject

__all__ = [
    "COMMON_FIELDS",
    "COMMON_WEIGHTS",
    "UNBOUNDED",
    "integer_expand",
    "limit_of",
    "prefixed",
    "refuse_unsupported",
]

# Not mapped, because they shape only random initialisation or speed: initializer_range, time_step_scale,
# time_step_init_scheme, rescale_prenorm_residual, use_cache, use_mambapy, use_associative_scan.
UNBOUNDED = (0.0, float("inf"))
"""No clamp of the step size."""

COMMON_FIELDS = (
    Field("d_model", "hidden_size"),
    Field("n_layers", "num_hidden_layers"),
    Field("d_vocab", "vocab_size"),
    Field("d_conv", "conv_kernel", 4),
    Field("eps", "layer_norm_epsilon", 1e-5),
    Field("use_bias", "use_bias", False),
    Field("conv_bias", "use_conv_bias", True),
    Field("residual_in_fp32", "residual_in_fp32", True),
    Field("dt_min", "time_step_min", 0.001),
    Field("dt_max", "time_step_max", 0.1),
    Field("dt_init_floor", "time_step_floor", 1e-4),
)

COMMON_WEIGHTS: dict[str, str | None] = {
    "backbone.embeddings.weight": "embed.weight",
    "backbone.embedding.weight": "embed.weight",  # the name in raw checkpoints and in early conversions
    "backbone.layers.{i}.norm.weight": "blocks.{i}.norm.weight",
    "backbone.layers.{i}.mixer.in_proj.weight": "blocks.{i}.mixer.in_proj.weight",
    "backbone.layers.{i}.mixer.in_proj.bias": "blocks.{i}.mixer.in_proj.bias",
    "backbone.layers.{i}.mixer.conv1d.weight": "blocks.{i}.mixer.conv1d.weight",
    "backbone.layers.{i}.mixer.conv1d.bias": "blocks.{i}.mixer.conv1d.bias",
    "backbone.layers.{i}.mixer.A_log": "blocks.{i}.mixer.A_log",
    "backbone.layers.{i}.mixer.D": "blocks.{i}.mixer.D",
    "backbone.layers.{i}.mixer.out_proj.weight": "blocks.{i}.mixer.out_proj.weight",
    "backbone.layers.{i}.mixer.out_proj.bias": "blocks.{i}.mixer.out_proj.bias",
    "backbone.norm_f.weight": "ln_final.weight",
    "lm_head.weight": "unembed.weight",
}


def refuse_unsupported(config: Mapping[str, Any], what: str) -> None:
    """Refuse what no mixer here computes. Names of raw configs that conversions left in (rms_norm, norm_before_gate)
    are not looked at: transformers reads neither, and the weights are run as it runs them."""
    reject(config, {"hidden_act": ("silu", "swish")}, what)


def limit_of(given: Any, field: str = "time_step_limit") -> tuple[float, float]:
    """`time_step_limit` in the forms that files have: none at all, or null or "Infinity" for a bound that is none.

    Raises
    ------
    CheckpointError
        It is no pair of numbers.
    """
    if given is None:
        return UNBOUNDED
    try:
        low, high = (
            default if bound is None else float(bound) for bound, default in zip(given, UNBOUNDED, strict=True)
        )
    except (TypeError, ValueError):
        raise CheckpointError(f"{field} must be two numbers or null, got {given!r}") from None
    return low, high


def integer_expand(cfg: SSMConfig) -> int:
    """`expand` as transformers wants it, a whole number."""
    if cfg.E % cfg.d_model:
        raise CheckpointError(
            f"transformers takes whole multiples of d_model as inner width, got d_inner={cfg.E} "
            f"for d_model={cfg.d_model}; save with format='raw' instead"
        )
    return cfg.E // cfg.d_model


def prefixed(state: Mapping[str, Tensor], weights: Mapping[str, str | None]) -> dict[str, str | None]:
    """`weights` as they are named in `state`: a bare backbone (MambaModel) is saved without the prefix."""
    if any(name.startswith("backbone.") for name in state):
        return dict(weights)
    return {theirs.removeprefix("backbone."): ours for theirs, ours in weights.items()}
