"""GGUF files of tiny random models, by gguf's own writer and name tables; what llama.cpp's converter does to weights
is written out here a second time, from its source and without the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
    """
    writer = gguf.GGUFWriter(path, architecture)
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


# Families ------------------------------------------------------------------------------------------------------------


def mamba(config: dict[str, Any], state: State) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Mamba and Falcon-Mamba."""
    d, n = config["hidden_size"], config["num_hidden_layers"]
    keys = {
        ".embedding_length": d,
        ".block_count": n,
        ".ssm.conv_kernel": config["conv_kernel"],
        ".ssm.inner_size": config["intermediate_size"],
        ".ssm.state_size": config["state_size"],
        ".ssm.time_step_rank": config["time_step_rank"],
        ".attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        ".ssm.dt_b_c_rms": config["model_type"] == "falcon_mamba",
    }

    def pairs() -> Converted:
        for name, tensor in state.items():
            if name.endswith("A_log"):
                yield name, decay(tensor)
            elif name.endswith("conv1d.weight"):
                yield name, tensor.squeeze()
            else:
                yield name, tensor

    return "mamba", keys, named(gguf.MODEL_ARCH.MAMBA, n, pairs())


def mamba2(config: dict[str, Any], state: State) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Mamba-2."""
    d, n = config["hidden_size"], config["num_hidden_layers"]
    E = config["expand"] * d
    keys = {
        ".embedding_length": d,
        ".block_count": n,
        ".ssm.conv_kernel": config["conv_kernel"],
        ".ssm.inner_size": E,
        ".ssm.state_size": config["state_size"],
        ".ssm.time_step_rank": E // config["head_dim"],
        ".ssm.group_count": config["n_groups"],
        ".attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
    }
    return "mamba2", keys, named(gguf.MODEL_ARCH.MAMBA2, n, mamba2_pairs(state, config["n_groups"]))


def mamba2_pairs(state: State, groups: int, norm: str = "mixer.norm.weight") -> Converted:
    """The tensors of Mamba-2 layers as they are converted, the others as they are."""
    for name, tensor in state.items():
        if name.endswith("A_log"):
            yield name, decay(tensor)[:, None]
        elif name.endswith(("mixer.D", "mamba.D")):
            yield name, tensor[:, None]
        elif name.endswith("dt_bias"):
            yield name.replace("dt_bias", "dt_proj.bias"), tensor
        elif name.endswith("conv1d.weight"):
            yield name, tensor.squeeze()
        elif name.endswith(norm):
            yield name, tensor.reshape(groups, -1)
        else:
            yield name, tensor


FAMILIES: dict[str, Callable[..., tuple[str, dict[str, Any], dict[str, Tensor]]]] = {
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
}
"""model_type of a folder -> how it is converted."""


def convert(folder: Path, path: Path, kind: str = "F32") -> Path:
    """A folder of transformers as a GGUF file."""
    config, state = source(folder)
    architecture, keys, tensors = FAMILIES[config["model_type"]](config, state)
    return write(path, architecture, keys, tensors, kind)
