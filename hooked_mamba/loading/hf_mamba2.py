"""Mamba-2 as transformers writes it (`model_type: mamba2`).

The gated norm takes its mean square per group. Releases of transformers before 5 took it over the full
width, which no checkpoint was trained with: it differs only for n_groups > 1, and a file means per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config
from hooked_mamba.loading.hf_fields import (
    COMMON_FIELDS,
    COMMON_WEIGHTS,
    UNBOUNDED,
    integer_expand,
    limit_of,
    prefixed,
    refuse_unsupported,
)
from hooked_mamba.loading.tables import (
    CheckpointError,
    Field,
    LazyState,
    from_ours_weights,
    read_fields,
    to_ours_weights,
    write_fields,
)
from hooked_mamba.loading.tying import drop_tied

__all__ = ["FIELDS", "WEIGHTS", "from_ours", "to_ours"]

FIELDS = (
    *COMMON_FIELDS,
    Field("d_state", "state_size", 128),
    Field("expand", "expand", 2),
    Field("head_dim", "head_dim", 64),
    Field("n_groups", "n_groups", 8),
    Field("dt_limit", "time_step_limit", UNBOUNDED),
    Field("chunk_size", "chunk_size", 256),
    Field("tie_embeddings", "tie_word_embeddings", False),  # not tied by default, unlike Mamba-1
    Field("bos_token_id", "bos_token_id", 0),
    Field("eos_token_id", "eos_token_id", 2),
    Field("pad_token_id", "pad_token_id", 1),
)

WEIGHTS: dict[str, str | None] = {
    **COMMON_WEIGHTS,
    "backbone.layers.{i}.mixer.dt_bias": "blocks.{i}.mixer.dt_bias",
    "backbone.layers.{i}.mixer.norm.weight": "blocks.{i}.mixer.norm.weight",
}


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[Mamba2Config, LazyState]:
    """Config and weights of a transformers Mamba-2, under our names.

    Raises
    ------
    CheckpointError
        A missing field, an unsupported value, heads that do not fill the inner width, or two tensors where
        the config says tied.
    """
    refuse_unsupported(config, "this Mamba-2 config")
    values = read_fields(config, FIELDS, "this Mamba-2 config")
    values["dt_limit"] = limit_of(values["dt_limit"])
    cfg = Mamba2Config(**values)
    heads = config.get("num_heads", 128)
    if heads != cfg.H:
        raise CheckpointError(
            f"this Mamba-2 config has num_heads={heads} and head_dim={cfg.P}, product {heads * cfg.P}; "
            f"expected expand * hidden_size = {cfg.E}"
        )
    state = to_ours_weights(state_dict, prefixed(state_dict, WEIGHTS), cfg.n_layers)
    return cfg, drop_tied(state, cfg.tie_embeddings)


def from_ours(cfg: Mamba2Config, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; a tied unembedding is not written.

    Raises
    ------
    CheckpointError
        What transformers cannot express: other groups or eps of the gated norm, a broken multiple of d_model.
    """
    if cfg.norm_groups != cfg.n_groups:
        raise CheckpointError(
            f"transformers norms per group: expected norm_groups={cfg.n_groups}, got {cfg.norm_groups}"
        )
    if cfg.norm_eps != cfg.eps:
        raise CheckpointError(
            f"transformers has one eps for all norms: expected norm_eps={cfg.eps}, got {cfg.norm_eps}"
        )
    config = write_fields(cfg, FIELDS) | {
        "expand": integer_expand(cfg),
        "num_heads": cfg.H,
        "hidden_act": "silu",
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
    }
    if cfg.dt_limit == UNBOUNDED:
        del config["time_step_limit"]  # infinity is no JSON number, and it is the default
    else:
        config["time_step_limit"] = list(cfg.dt_limit)
    return config, from_ours_weights(state_dict, WEIGHTS, cfg.n_layers)
