"""Falcon-Mamba as transformers writes it (`model_type: falcon_mamba`, arXiv:2410.05355).

Mamba-1 with RMS norms on low-rank dt, B and C. The norms have no weights, so there is no tensor for them;
their eps is `mixer_rms_eps`, not the block's `layer_norm_epsilon`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import MambaConfig
from hooked_mamba.loading import hf_mamba
from hooked_mamba.loading.tables import CheckpointError, LazyState

__all__ = ["from_ours", "to_ours"]


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[MambaConfig, LazyState]:
    """Config and weights of a transformers Falcon-Mamba, under our names. Errors as for Mamba."""
    cfg, state = hf_mamba.to_ours(config, state_dict)
    eps = config.get("mixer_rms_eps", 1e-6)
    return dataclasses.replace(cfg, mixer_norms=True, mixer_norm_eps=eps), state


def from_ours(cfg: MambaConfig, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`."""
    if not cfg.mixer_norms:
        raise CheckpointError("mixer_norms=False is a plain Mamba; expected mixer_norms=True for this format")
    config, state = hf_mamba.from_ours(dataclasses.replace(cfg, mixer_norms=False), state_dict)
    return config | {
        "mixer_rms_eps": cfg.mixer_norm_eps,
        "model_type": "falcon_mamba",
        "architectures": ["FalconMambaForCausalLM"],
    }, state
