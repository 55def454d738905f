"""Writing a coder so that a crash never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from hooked_mamba.durable import sync, write_file
from saes.files.checks import STORED, CoderFileError, dtype_name
from saes.files.own import full_config
from saes.files.rounding import rounded
from saes.files.saelens import to_file
from saes.parameters import CoderParameters

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


def save(
    coder: CoderParameters,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write a directory that :func:`saes.files.load` reads, and SAELens wherever it has such a coder.

    A new folder appears whole or not at all. In a folder that is there, both files are replaced, others stay; if the
    machine stops between the two, loading says so. A scale of the input is folded into the weights first.

    Parameters
    ----------
    folder
        Where to write; created if needed.
    dtype
        Of the matrices on disk: "float16", "bfloat16", "float32", "float64" or "float8_e4m3fn", a byte a number; None:
        as they are. In half precision and float8 biases and thresholds stay float32.
    metrics
        Numbers by name to keep beside the config, such as "fvu" and "l0"; model cards and registries show them.
    training
        What it was trained on, short texts and numbers by name, such as {"text": "stories.txt", "tokens": 1_000_000}.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    CoderFileError
        For weights that are not finite, too large for the dtype or too small for float8, or a file in the folder's
        place.
    DiskFullError
        If there is no room; what was there before is untouched.
    """
    folder = Path(folder).expanduser()
    coder = coder.fold()
    name = dtype_name(coder.W_enc.dtype if dtype is None else dtype, among=STORED)
    state = {key: value.detach().cpu() for key, value in coder.state_dict().items()}
    tensors = {key: rounded(value, name, key) for key, value in to_file(coder.cfg, state).items()}
    weights = to_bytes(tensors, metadata={"format": "pt"})
    config = full_config(coder.cfg, name, hashlib.sha256(weights).hexdigest(), metrics or {}, training or {})
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    write_files(folder, {WEIGHTS: weights, CONFIG: text.encode()})
    return folder


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files to a temporary folder, sync them, then move them in, in the order given."""
    if folder.exists() and not folder.is_dir():
        raise CoderFileError(f"{folder} is a file; expected a folder to write into")
    if (folder / "sae.safetensors").exists():
        raise CoderFileError(f"{folder} holds another library's coder (sae.safetensors); choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    aside.mkdir()
    try:
        for name, data in files.items():
            write_file(aside / name, data)
        if folder.exists():
            for name in files:
                os.replace(aside / name, folder / name)
            sync(folder)
        else:
            os.rename(aside, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
