"""Mamba-1 as transformers writes it (`model_type: mamba`, the `state-spaces/mamba-*-hf` checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import MambaConfig
from hooked_mamba.loading.hf_fields import (
    COMMON_FIELDS,
    COMMON_WEIGHTS,
    integer_expand,
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
    Field("d_state", "state_size", 16),
    Field("expand", "expand", 2),
    Field("d_inner", "intermediate_size", None),
    Field("dt_rank", "time_step_rank", "auto"),
    Field("tie_embeddings", "tie_word_embeddings", True),
    Field("bos_token_id", "bos_token_id", 0),
    Field("eos_token_id", "eos_token_id", 0),
    Field("pad_token_id", "pad_token_id", 0),
)

WEIGHTS: dict[str, str | None] = {
    **COMMON_WEIGHTS,
    "backbone.layers.{i}.mixer.x_proj.weight": "blocks.{i}.mixer.x_proj.weight",
    "backbone.layers.{i}.mixer.dt_proj.weight": "blocks.{i}.mixer.dt_proj.weight",
    "backbone.layers.{i}.mixer.dt_proj.bias": "blocks.{i}.mixer.dt_proj.bias",
}


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[MambaConfig, LazyState]:
    """Config and weights of a transformers Mamba, under our names.

    Raises
    ------
    CheckpointError
        A missing field, an unsupported value, or two tensors where the config says tied.
    """
    refuse_unsupported(config, "this Mamba config")
    values = read_fields(config, FIELDS, "this Mamba config")
    values["dt_rank"] = None if values["dt_rank"] == "auto" else values["dt_rank"]
    cfg = MambaConfig(**values)
    state = to_ours_weights(state_dict, prefixed(state_dict, WEIGHTS), cfg.n_layers)
    return cfg, drop_tied(state, cfg.tie_embeddings)


def from_ours(cfg: MambaConfig, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; a tied unembedding is not written.

    Raises
    ------
    CheckpointError
        What this family of transformers cannot express: Falcon's norms, a broken multiple of d_model.
    """
    if cfg.mixer_norms:
        raise CheckpointError("mixer_norms=True is a Falcon-Mamba; expected mixer_norms=False for this format")
    config = write_fields(cfg, FIELDS) | {
        "expand": integer_expand(cfg),
        "hidden_act": "silu",
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
    }
    return config, from_ours_weights(state_dict, WEIGHTS, cfg.n_layers)
