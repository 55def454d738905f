"""Mamba, Falcon-Mamba and Mamba-2 in GGUF files (architectures `mamba` and `mamba2`).

Falcon-Mamba has the architecture of Mamba; only the key `mamba.ssm.dt_b_c_rms` tells it. The eps of its norms on dt, B
and C is not in the file: it is the 1e-6 of transformers' config. Where the file says nothing, the step size has no
limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading.gguf import common
from hooked_mamba.loading.gguf.keys import Keys
from hooked_mamba.loading.sources import Whole, read_table
from hooked_mamba.loading.tables import LazyState

__all__ = ["mamba2_to_ours", "mamba_to_ours"]


def mamba_to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[MambaConfig, LazyState]:
    """Config and weights of a Mamba or Falcon-Mamba, under our names."""
    keys = Keys(values)
    cfg = common.mamba(keys, state, common.stack(keys, state), mixer_norms=keys.flag("ssm.dt_b_c_rms", False))
    return cfg, _read(cfg, state, common.mamba_weights)


def mamba2_to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[Mamba2Config, LazyState]:
    """Config and weights of a Mamba-2, under our names."""
    keys = Keys(values)
    cfg = common.mamba2(keys, state, common.stack(keys, state))
    return cfg, _read(cfg, state, common.mamba2_weights)


def _read(cfg: Any, state: Mapping[str, Tensor], mixer: Any) -> LazyState:
    table = common.stack_weights(cfg.tie_embeddings)
    for i in range(cfg.n_layers):
        there = f"blk.{i}"
        table |= common.block({"norm.weight": Whole(f"{there}.attn_norm.weight"), **mixer(there, cfg)}, i)
    return read_table(state, table)
