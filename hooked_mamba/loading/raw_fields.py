"""What the two raw families have in common: config.json of mamba_ssm, weights in pytorch_model.bin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hooked_mamba.config import SSMConfig
from hooked_mamba.loading.hf_fields import COMMON_WEIGHTS
from hooked_mamba.loading.tables import CheckpointError, Field, check_known, read_fields, reject

__all__ = [
    "COMMON_SSM_FIELDS",
    "NORM_EPS",
    "RAW_WEIGHTS",
    "non_default",
    "read_ssm_cfg",
    "read_top",
    "ssm_layer",
    "write_top",
]

NORM_EPS = 1e-5
"""The eps of every norm in mamba_ssm, which has no field for it."""

TOP_FIELDS = (
    Field("d_model", "d_model"),
    Field("n_layers", "n_layer"),
    Field("residual_in_fp32", "residual_in_fp32", True),
    Field("tie_embeddings", "tie_embeddings", True),
    Field("eps", "norm_epsilon", NORM_EPS),
    Field("bos_token_id", "bos_token_id", None),
    Field("eos_token_id", "eos_token_id", None),
    Field("pad_token_id", "pad_token_id", None),
)

COMMON_SSM_FIELDS = (
    Field("d_conv", "d_conv", 4),
    Field("expand", "expand", 2),
    Field("use_bias", "bias", False),
    Field("conv_bias", "conv_bias", True),
    Field("dt_min", "dt_min", 0.001),
    Field("dt_max", "dt_max", 0.1),
    Field("dt_init_floor", "dt_init_floor", 1e-4),
)

# What speaks of no weight and of no step of the computation.
BOOKKEEPING = {
    "architectures",
    "dtype",
    "fused_add_norm",
    "initializer_cfg",
    "model_type",
    "torch_dtype",
    "transformers_version",
}

# A plain language model of Mamba blocks and nothing else.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "rms_norm": (True,),
    "d_intermediate": (0, None),
    "attn_layer_idx": ([], None),
    "attn_cfg": ({}, None),
}

RAW_WEIGHTS: dict[str, str | None] = {
    "backbone.embedding.weight": "embed.weight",
    **{theirs: ours for theirs, ours in COMMON_WEIGHTS.items() if ours != "embed.weight"},
    "backbone.embeddings.weight": "embed.weight",  # the name in transformers
}


def ssm_layer(config: Mapping[str, Any]) -> str:
    """Which mixer a raw config asks for; an absent `layer` means Mamba1."""
    return (config.get("ssm_cfg") or {}).get("layer", "Mamba1")


def read_top(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields outside `ssm_cfg`; the vocabulary is padded up as mamba_ssm does when it builds the model.

    Raises
    ------
    CheckpointError
        A missing or unknown field, LayerNorms, attention layers or MLPs.
    """
    known = {row.theirs for row in TOP_FIELDS} | BOOKKEEPING | set(ALLOWED)
    check_known(config, known | {"vocab_size", "pad_vocab_size_multiple", "ssm_cfg"}, what)
    reject(config, ALLOWED, what)
    values = read_fields(config, (*TOP_FIELDS, Field("d_vocab", "vocab_size")), what)
    multiple = config.get("pad_vocab_size_multiple", 8)
    for name, value in (("vocab_size", values["d_vocab"]), ("pad_vocab_size_multiple", multiple)):
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{what} has {name}={value!r}; expected a positive integer")
    values["d_vocab_unpadded"] = values["d_vocab"]
    values["d_vocab"] = -(-values["d_vocab"] // multiple) * multiple
    return values


def read_ssm_cfg(
    config: Mapping[str, Any],
    fields: tuple[Field, ...],
    allowed: Mapping[str, tuple[Any, ...]],
    unused: set[str],
    what: str,
) -> dict[str, Any]:
    """The fields in `ssm_cfg`; `allowed` ones must have one of the values given, `unused` ones go unread."""
    ssm_cfg = dict(config.get("ssm_cfg") or {})
    check_known(ssm_cfg, {row.theirs for row in fields} | set(allowed) | unused | {"layer"}, f"ssm_cfg of {what}")
    reject(ssm_cfg, allowed, f"ssm_cfg of {what}")
    return read_fields(ssm_cfg, fields, f"ssm_cfg of {what}")


def write_top(cfg: SSMConfig, ssm_cfg: dict[str, Any]) -> dict[str, Any]:
    """A raw config.json with exactly the fields mamba_ssm's own config class takes.

    Raises
    ------
    CheckpointError
        An eps other than 1e-5, which mamba_ssm cannot express, or a vocabulary it would pad otherwise.
    """
    if cfg.eps != NORM_EPS:
        raise CheckpointError(f"mamba_ssm has eps={NORM_EPS} built in; expected that, got eps={cfg.eps}")
    vocab = cfg.d_vocab if cfg.d_vocab_unpadded is None else cfg.d_vocab_unpadded
    return {
        "d_model": cfg.d_model,
        "n_layer": cfg.n_layers,
        "vocab_size": vocab,
        "ssm_cfg": ssm_cfg,
        "rms_norm": True,
        "residual_in_fp32": cfg.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": _multiple(vocab, cfg.d_vocab),
        "tie_embeddings": cfg.tie_embeddings,
    }


def _multiple(vocab: int, padded: int) -> int:
    """The multiple that takes `vocab` to `padded`: the usual 8 and 16 first."""
    for multiple in (8, 16, 1, *(2**k for k in range(5, 13)), padded):
        if -(-vocab // multiple) * multiple == padded:
            return multiple
    raise AssertionError("a number is a multiple of itself")


def non_default(cfg: SSMConfig, fields: tuple[Field, ...]) -> dict[str, Any]:
    """`ssm_cfg` entries of `cfg` that differ from mamba_ssm's defaults: theirs are written sparsely."""
    values = {row.theirs: getattr(cfg, row.ours) for row in fields}
    return {row.theirs: values[row.theirs] for row in fields if values[row.theirs] != row.default}
