"""Mamba-1 as mamba_ssm writes it (the `state-spaces/mamba-*` checkpoints)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import MambaConfig
from hooked_mamba.loading.hf_mamba import WEIGHTS as HF_WEIGHTS
from hooked_mamba.loading.raw_fields import (
    COMMON_SSM_FIELDS,
    RAW_WEIGHTS,
    non_default,
    read_ssm_cfg,
    read_top,
    write_top,
)
from hooked_mamba.loading.tables import (
    CheckpointError,
    Field,
    LazyState,
    from_ours_weights,
    reject,
    to_ours_weights,
)
from hooked_mamba.loading.tying import drop_tied, repeat_tied

__all__ = ["SSM_FIELDS", "WEIGHTS", "from_ours", "to_ours"]

SSM_FIELDS = (
    Field("d_state", "d_state", 16),
    *COMMON_SSM_FIELDS,
    Field("dt_rank", "dt_rank", "auto"),
)

# Random initialisation and speed.
UNUSED = {"conv_init", "dt_init", "dt_scale", "use_fast_path"}

WEIGHTS: dict[str, str | None] = RAW_WEIGHTS | {t: o for t, o in HF_WEIGHTS.items() if t not in RAW_WEIGHTS}


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[MambaConfig, LazyState]:
    """Config and weights of a raw Mamba-1, under our names.

    Raises
    ------
    CheckpointError
        A missing or unknown field, an unsupported value, or two tensors where the config says tied.
    """
    what = "this raw Mamba config"
    values = read_top(config, what) | read_ssm_cfg(config, SSM_FIELDS, {}, UNUSED, what)
    reject(config.get("ssm_cfg") or {}, {"layer": ("Mamba1",)}, f"ssm_cfg of {what}")
    values["dt_rank"] = None if values["dt_rank"] == "auto" else values["dt_rank"]
    cfg = MambaConfig(**values)
    return cfg, drop_tied(to_ours_weights(state_dict, WEIGHTS, cfg.n_layers), cfg.tie_embeddings)


def from_ours(cfg: MambaConfig, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; a tied embedding is written under both names, as mamba_ssm does.

    Raises
    ------
    CheckpointError
        What mamba_ssm cannot express: Falcon's norms, another eps, an inner width `expand` does not give.
    """
    if cfg.mixer_norms:
        raise CheckpointError("mamba_ssm has no norms inside Mamba-1; expected mixer_norms=False")
    if int(cfg.expand * cfg.d_model) != cfg.E:
        raise CheckpointError(f"mamba_ssm takes int(expand * d_model) as inner width; expected that, got {cfg.E}")
    ssm_cfg = non_default(cfg, SSM_FIELDS)
    if math.ceil(cfg.d_model / 16) == cfg.R:
        ssm_cfg.pop("dt_rank", None)
    state = from_ours_weights(repeat_tied(LazyState.of(state_dict), cfg.tie_embeddings), WEIGHTS, cfg.n_layers)
    return write_top(cfg, ssm_cfg), state
