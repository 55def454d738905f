"""Checkpoints that survive a crash: one safetensors file, written aside, flushed to disk, then renamed.

Tensors (weights, optimiser moments, random states) are the file's tensors; scalars are JSON in its header, so that
the two can never disagree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn, optim


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` as a whole: after a crash either the old or the new content is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Write tensors and scalars as one file."""
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(contiguous, {"scalars": json.dumps(scalars)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If the file is not whole, or not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            scalars = (file.metadata() or {}).get("scalars")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if scalars is None:
        raise ValueError(f"{path} is no training checkpoint: its header holds no scalars")
    return tensors, json.loads(scalars)


def optimizer_tensors(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and step counts by parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{kind}.{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def restore_optimizer(model: nn.Module, optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            optimizer.state[parameters[name]][kind] = value.clone()
