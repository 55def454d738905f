"""One tiny Mamba as a GGUF file, with whatever is to be different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.hooked_mamba.loading.gguf.written import write

D, E, N, R, V = 32, 64, 4, 3, 40

KEYS: dict[str, Any] = {
    ".embedding_length": D,
    ".block_count": 1,
    ".ssm.conv_kernel": 4,
    ".ssm.inner_size": E,
    ".ssm.state_size": N,
    ".ssm.time_step_rank": R,
    ".attention.layer_norm_rms_epsilon": 1e-5,
}

SHAPES = {
    "token_embd.weight": (V, D),
    "output_norm.weight": (D,),
    "blk.0.attn_norm.weight": (D,),
    "blk.0.ssm_in.weight": (2 * E, D),
    "blk.0.ssm_conv1d.weight": (E, 4),
    "blk.0.ssm_conv1d.bias": (E,),
    "blk.0.ssm_x.weight": (R + 2 * N, E),
    "blk.0.ssm_dt.weight": (E, R),
    "blk.0.ssm_dt.bias": (E,),
    "blk.0.ssm_a": (E, N),
    "blk.0.ssm_d": (E,),
    "blk.0.ssm_out.weight": (D, E),
}


def tensors() -> dict[str, Tensor]:
    """Random weights."""
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in SHAPES.items()}
    return found | {"blk.0.ssm_a": -found["blk.0.ssm_a"].exp()}


def mamba_file(
    path: Path,
    keys: dict[str, Any] | None = None,
    changed: dict[str, Tensor | None] | None = None,
    kind: str = "F32",
    architecture: str = "mamba",
    **split: Any,
) -> Path:
    """The file; a key or tensor given as None is left out."""
    values = {name: value for name, value in (KEYS | (keys or {})).items() if value is not None}
    given = {name: tensor for name, tensor in (tensors() | (changed or {})).items() if tensor is not None}
    return write(path, architecture, values, given, kind, **split)
