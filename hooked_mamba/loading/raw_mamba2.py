"""Mamba-2 as mamba_ssm writes it (the `state-spaces/mamba2-*` checkpoints).

The gated norm has groups of d_ssm / ngroups channels, comes after the gate, and has an eps of 1e-5 that no
field sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config
from hooked_mamba.loading.hf_fields import limit_of
from hooked_mamba.loading.hf_mamba2 import WEIGHTS as HF_WEIGHTS
from hooked_mamba.loading.raw_fields import (
    COMMON_SSM_FIELDS,
    NORM_EPS,
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
    Field("d_state", "d_state", 128),
    *COMMON_SSM_FIELDS,
    Field("head_dim", "headdim", 64),
    Field("n_groups", "ngroups", 1),
    Field("dt_limit", "dt_limit", (0.0, float("inf"))),
    Field("A_init_range", "A_init_range", (1.0, 16.0)),
    Field("chunk_size", "chunk_size", 256),
)

ALLOWED = {"rmsnorm": (True,), "norm_before_gate": (False,), "process_group": (None,)}

# Random initialisation, speed, and what is read from the weights or checked below.
UNUSED = {"conv_init", "use_mem_eff_path", "sequence_parallel", "D_has_hdim", "d_ssm"}

WEIGHTS: dict[str, str | None] = RAW_WEIGHTS | {t: o for t, o in HF_WEIGHTS.items() if t not in RAW_WEIGHTS}


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[Mamba2Config, LazyState]:
    """Config and weights of a raw Mamba-2, under our names.

    Raises
    ------
    CheckpointError
        A missing or unknown field, an unsupported value, two tensors where the config says tied, or (when the
        tensor is read) a D that differs within a head.
    """
    what = "this raw Mamba-2 config"
    values = read_top(config, what) | read_ssm_cfg(config, SSM_FIELDS, ALLOWED, UNUSED, what)
    ssm_cfg = config.get("ssm_cfg") or {}
    reject(ssm_cfg, {"layer": ("Mamba2",)}, f"ssm_cfg of {what}")
    values["dt_limit"] = limit_of(values["dt_limit"], "dt_limit")
    values["A_init_range"] = tuple(map(float, values["A_init_range"]))  # a list in JSON
    cfg = Mamba2Config(**values, norm_eps=NORM_EPS)
    reject(ssm_cfg, {"d_ssm": (None, cfg.E)}, f"ssm_cfg of {what}")
    state = to_ours_weights(state_dict, WEIGHTS, cfg.n_layers)
    state = state.with_changed({f"blocks.{i}.mixer.D": _one_per_head(cfg, i) for i in range(cfg.n_layers)})
    return cfg, drop_tied(state, cfg.tie_embeddings)


def _one_per_head(cfg: Mamba2Config, layer: int) -> Callable[[Tensor], Tensor]:
    """A D of length E (`D_has_hdim`) as one number per head, where it is that."""

    def change(D: Tensor) -> Tensor:
        if D.ndim != 1 or cfg.P == 1 or len(D) != cfg.E:
            return D
        heads = D.view(cfg.H, cfg.P)
        differ = (heads != heads[:, :1]).any(dim=1).nonzero().flatten().tolist()
        if differ:
            raise CheckpointError(
                f"D of block {layer} has one value per channel (D_has_hdim), and they differ in "
                f"{len(differ)} of {cfg.H} heads, first in head {differ[0]}; expected one value per head"
            )
        return heads[:, 0].contiguous()

    return change


def from_ours(cfg: Mamba2Config, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; a tied embedding is written under both names, as mamba_ssm does.

    Raises
    ------
    CheckpointError
        What mamba_ssm cannot express: another eps or another grouping of the gated norm, another inner width.
    """
    if cfg.norm_groups != cfg.n_groups:
        raise CheckpointError(f"mamba_ssm norms per group: expected norm_groups={cfg.n_groups}, got {cfg.norm_groups}")
    if cfg.norm_eps != NORM_EPS:
        raise CheckpointError(f"mamba_ssm has norm_eps={NORM_EPS} built in; expected that, got {cfg.norm_eps}")
    if cfg.expand * cfg.d_model != cfg.E:
        raise CheckpointError(f"mamba_ssm takes expand * d_model as inner width; expected that, got {cfg.E}")
    state = from_ours_weights(repeat_tied(LazyState.of(state_dict), cfg.tie_embeddings), WEIGHTS, cfg.n_layers)
    return write_top(cfg, {"layer": "Mamba2"} | non_default(cfg, SSM_FIELDS)), state
