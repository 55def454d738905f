"""Writing checkpoints that transformers or the authors' own code reads, so that a crash leaves no half of one."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hooked_mamba.config import ModelConfig
from hooked_mamba.loading.registry import format_for
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.weights import Shape, check_shapes, target_dtype

__all__ = ["save_checkpoint"]

SHARD_BYTES = 5 * 10**9

WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin|pth)(\.index\.json)?")
"""Files that an earlier save into the same folder may have left, and that a loader would prefer or mix in."""


def save_checkpoint(
    folder: str | Path,
    cfg: ModelConfig,
    state_dict: Mapping[str, Tensor],
    format: str = "hf",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    also: Callable[[Path], Any] | None = None,
    shapes: Mapping[str, Shape] | None = None,
    float32: Collection[str] = (),
) -> None:
    """Write config and weights.

    A new folder appears whole or not at all. In a folder that is there, each file is replaced whole, weights
    first, and weight files of an earlier save are removed; other files (a tokenizer's) stay.

    Parameters
    ----------
    folder
        Where to; made if need be.
    cfg, state_dict
        The model, under our names.
    format
        "hf": config.json and model.safetensors, in shards above `shard_bytes`, for transformers. "raw":
        what the authors' own code reads: config.json and pytorch_model.bin (mamba_ssm), or one file model.pth (RWKV).
    dtype
        dtype of the stored weights; None: as they are. Those of `float32` stay float32 in half precision.
    shard_bytes
        Largest size of one safetensors file.
    also
        Writes further files into the folder it is given, such as `tokenizer.save_pretrained`; they appear with
        the others.
    shapes
        What weights the config asks for, to be checked; None: they are the model's own.
    float32
        Names of the weights that are never stored in half precision.

    Raises
    ------
    CheckpointError
        Weights that do not fit `cfg`, what the format cannot express, or a file in the folder's place.
    """
    if shapes is not None:
        check_shapes(shapes, state_dict)
    state = LazyState.of(state_dict)
    if dtype is not None:
        state = state.with_changed({name: _caster(target_dtype(name, dtype, float32)) for name in state})
    form = format_for(cfg, format)
    config, named = form.from_ours(cfg, state)
    if format == "hf":
        config["torch_dtype"] = str(state["embed.weight"].dtype).removeprefix("torch.")  # read by every release
        writers = _safetensors_writers(named, shard_bytes)
    else:
        writers = {form.raw_file: lambda path: _write_bin(named, cfg.tie_embeddings, path)}
    if form.has_config:
        writers["config.json"] = lambda path: _write_json(config, path)
    _write_all(Path(folder).expanduser(), writers, also)


Writer = Callable[[Path], None]


def _caster(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy that shares no storage: a view would be written with all it is a view of."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _safetensors_writers(state: LazyState, shard_bytes: int) -> dict[str, Writer]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in state:
        nbytes = state[name].nbytes
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes

    def writer(names: list[str]) -> Writer:
        return lambda path: save_file({n: _own(state[n]) for n in names}, path, metadata={"format": "pt"})

    if len(shards) == 1:
        return {"model.safetensors": writer(shards[0])}
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = {
        "metadata": {"total_size": sum(state[name].nbytes for name in state)},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    writers: dict[str, Writer] = {file: writer(names) for file, names in zip(files, shards, strict=True)}
    writers["model.safetensors.index.json"] = lambda path: _write_json(index, path)
    return writers


def _write_bin(state: LazyState, tied: bool, path: Path) -> None:
    weights = {name: _own(state[name]) for name in state if not (tied and name == "lm_head.weight")}
    if tied:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]  # stored once, under both names
    torch.save(weights, path)


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_all(folder: Path, writers: dict[str, Writer], also: Callable[[Path], Any] | None = None) -> None:
    """Write every file beside the folder, bring them to the disk, then move them in."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder to write into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    scratch.mkdir()
    try:
        if also is not None:
            also(scratch)
        for name, write in writers.items():
            write(scratch / name)
        # config.json comes last: a folder without it is no checkpoint yet.
        names = sorted((path.name for path in scratch.iterdir()), key=lambda name: name == "config.json")
        for name in names:
            _sync(scratch / name)
        if folder.exists():
            for name in names:
                os.replace(scratch / name, folder / name)
            for path in folder.iterdir():
                if WEIGHT_FILE.fullmatch(path.name) and path.name not in writers:
                    path.unlink()
        else:
            os.rename(scratch, folder)
        _sync(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
