"""GGUF files by gguf's own writer and name tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

gguf = pytest.importorskip("gguf")

State = dict[str, Tensor]
Converted = Iterator[tuple[str, Tensor]]

KEPT_FLOAT = ("_norm.weight", "ssm_conv1d.weight", "shortconv.conv.weight", "ffn_gate_inp.weight", "inp_shexp.weight")
"""Endings of matrices that the converter never rounds."""


def source(folder: Path) -> tuple[dict[str, Any], State]:
    """config.json and the tensors of a folder."""
    config = json.loads((folder / "config.json").read_text())
    return config, {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def write(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: dict[str, Tensor | np.ndarray],
    kind: str = "F32",
    types: dict[str, str] | None = None,
    **split: Any,
) -> Path:
    """A GGUF file.

    Parameters
    ----------
    path
        Where it goes.
    architecture
        `general.architecture`; it is put in front of keys that begin with a dot.
    keys
        Values by key.
    tensors
        By their names in the file.
    kind
        Type of matrices; vectors and what the converter keeps are float32.
    types
        Types of some tensors, by name.
    split
        How the writer is to split it, such as `split_max_tensors`.
    """
    writer = gguf.GGUFWriter(path, architecture, **split)
    for name, value in keys.items():
        full = f"{architecture}{name}" if name.startswith(".") else name
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    for name, tensor in tensors.items():
        data = tensor.detach().float().contiguous().numpy() if isinstance(tensor, Tensor) else tensor
        vector = data.ndim <= 1 or name.endswith(KEPT_FLOAT) or not name.endswith(".weight")
        wanted = (types or {}).get(name, "F32" if vector else kind)
        type_ = gguf.GGMLQuantizationType[wanted]
        if data.dtype == np.uint8:  # blocks as they are
            writer.add_tensor(name, data, raw_dtype=type_)
        else:
            if data.shape[-1] % gguf.GGML_QUANT_SIZES[type_][0]:  # rows that are no whole blocks: as the converter does
                type_ = gguf.GGMLQuantizationType.F16
            writer.add_tensor(name, gguf.quants.quantize(data, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(architecture: Any, n: int, pairs: Converted) -> dict[str, Tensor]:
    """Tensors under the names that gguf's table gives them."""
    names = gguf.get_tensor_name_map(architecture, n)
    found = {}
    for theirs, tensor in pairs:
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        found[name] = tensor
    return found


def decay(tensor: Tensor) -> Tensor:
    """-exp(A_log), in float32 as the converter computes it."""
    return -torch.exp(tensor.float())
