"""The types of numbers in GGUF files, and reading a tensor of one of them.

Plain floating point is read here. Quantised types are taken back to float32 by the package `gguf`, whose
`dequantize` says what they mean; it is asked a piece at a time, so that what it needs in between stays small.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_mamba.loading.gguf.header import Header, TensorEntry
from hooked_mamba.loading.shapes import fresh, shapes_only
from hooked_mamba.loading.tables import CheckpointError, LazyState, Place

__all__ = ["NAMES", "open_tensors"]

PLAIN = {0: (torch.float32, 4), 1: (torch.float16, 2), 28: (torch.float64, 8), 30: (torch.bfloat16, 2)}
"""Number of a ggml type -> dtype, bytes of one number."""

NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Number of a ggml type -> its name."""

ELEMENTS_AT_ONCE = 2**17
"""Dequantised in one piece: what that takes stays in the processor's cache."""

Dequantise = Callable[[np.ndarray], np.ndarray]


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError(
            f"{path}: {name} is quantised, and the package gguf, which knows what its bits mean, is not installed:"
            " pip install 'hooked-mamba[gguf]'"
        ) from None


def _quantised(entry: TensorEntry, path: Path) -> tuple[int, int, Dequantise]:
    """(numbers of a block, bytes of a block, what turns bytes into numbers).

    Raises
    ------
    CheckpointError
        No such type, no dequantiser for it, or the package gguf is not installed.
    """
    kind = NAMES.get(entry.type)
    if kind is None:
        raise CheckpointError(f"{path}: the tensor {entry.name} is of type {entry.type}, which is not known here")
    if kind.startswith("I") and kind[1:].isdigit():
        raise CheckpointError(
            f"{path}: the tensor {entry.name} holds whole numbers ({kind}), which no weight here does"
        )
    gguf = _library(f"the tensor {entry.name} ({kind})", path)
    try:
        type_ = gguf.GGMLQuantizationType(entry.type)
        numbers, size = gguf.GGML_QUANT_SIZES[type_]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), type_)
    except (ValueError, KeyError, NotImplementedError, AttributeError):
        raise CheckpointError(
            f"{path}: the tensor {entry.name} is of type {kind}, which the installed package gguf does not dequantise"
        ) from None
    # As one row: the library works through sixteen rows at a time, in Python.
    return numbers, size, lambda blocks: gguf.quants.dequantize(blocks.reshape(1, -1), type_)


def open_tensors(header: Header) -> LazyState:
    """The tensors of a file under its own names, each read when it is asked for.

    Quantised tensors are float32, plain ones of their own dtype.

    Raises
    ------
    CheckpointError
        A tensor of a type that is not read, of rows that are no whole blocks, or beyond the end of the file.
    """
    known: dict[int, tuple[int, int, Dequantise]] = {}
    getters: dict[str, Callable[[], Tensor]] = {}
    for entry in header.tensors.values():
        if entry.type in PLAIN:
            getters[entry.name] = _plain(header, entry)
            numbers, size = 1, PLAIN[entry.type][1]
        else:
            if entry.type not in known:
                known[entry.type] = _quantised(entry, header.path)
            numbers, size, dequantise = known[entry.type]
            if entry.shape[-1] % numbers:
                raise CheckpointError(
                    f"{header.path}: the tensor {entry.name} has rows of {entry.shape[-1]}, which are no whole blocks"
                    f" of {numbers} ({NAMES[entry.type]})"
                )
            getters[entry.name] = _blocks(header, entry, numbers, size, dequantise)
        end = entry.offset + math.prod(entry.shape) // numbers * size
        if end > header.size:
            raise CheckpointError(
                f"{header.path} is truncated: the tensor {entry.name} ends at byte {end:,}, the file at {header.size:,}"
            )
    return LazyState(getters, {name: Place(name, header.path.name) for name in getters})


def _plain(header: Header, entry: TensorEntry) -> Callable[[], Tensor]:
    dtype, _ = PLAIN[entry.type]

    def read() -> Tensor:
        if shapes_only():
            return torch.empty(entry.shape, dtype=dtype, device="meta")
        found = torch.empty(entry.shape, dtype=dtype)
        _read_into(header, entry.offset, found.view(torch.uint8).numpy() if found.ndim else found.numpy())
        return fresh(found)

    return read


def _blocks(
    header: Header, entry: TensorEntry, numbers: int, size: int, dequantise: Dequantise
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if shapes_only():
            return torch.empty(entry.shape, device="meta")
        found = torch.empty(entry.shape)
        target = found.view(-1).numpy()
        at_once = max(1, ELEMENTS_AT_ONCE // numbers)
        piece = np.empty((at_once, size), np.uint8)
        with header.path.open("rb") as file, np.errstate(all="ignore"):  # NaN is reported by whoever takes the weight
            file.seek(entry.offset)
            for start in range(0, len(target) // numbers, at_once):
                blocks = piece[: len(target) // numbers - start]
                _fill(header, file, blocks)
                target[start * numbers : (start + len(blocks)) * numbers] = dequantise(blocks).reshape(-1)
        return fresh(found)

    return read


def _read_into(header: Header, offset: int, target: np.ndarray) -> None:
    with header.path.open("rb") as file:
        file.seek(offset)
        _fill(header, file, target)


def _fill(header: Header, file: Any, target: np.ndarray) -> None:
    if file.readinto(target.data.cast("B")) != target.nbytes:
        raise CheckpointError(f"{header.path} has become shorter while it was read")
