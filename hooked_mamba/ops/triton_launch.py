"""What the launches share: the device, the blocks and chunks of a sequence, and tensors laid out as kernels want."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
from torch import Tensor

FALLBACK_MULTIPROCESSORS = 132
"""Multiprocessors assumed where there is no device to ask (interpreter, compile-only): those of an H100 or H200."""


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, as a launch needs it."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device."""
    return _multiprocessors(device) if device.type == "cuda" else FALLBACK_MULTIPROCESSORS


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_major(tensor: Tensor) -> Tensor:
    """The tensor if its rows b l stand a fixed distance apart with unit stride inside, else a copy that does so."""
    fits = tensor.stride(-1) == 1 and (tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1))
    return tensor if fits else tensor.contiguous()


@dataclass(frozen=True)
class Events:
    """Where the state is edited and saved; positions ascend."""

    edits: tuple[int, ...] = ()
    saves: tuple[int, ...] = ()


@dataclass(frozen=True)
class Blocks:
    """How a sequence is cut: blocks of at most T positions, and chunks of `per_chunk` blocks."""

    T: int
    table: Tensor | None
    """Rows (first position, length, edit, save), int32; None if all blocks but the last have T positions."""
    count: int
    per_chunk: int
    even: bool
    """All blocks have T positions."""

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.count, self.per_chunk)


@lru_cache(maxsize=64)
def cut(length: int, T: int, per_chunk: int, events: Events, device: torch.device, events_last: bool = False) -> Blocks:
    """Cut a sequence into blocks that begin at multiples of T and at every event, and these into chunks.

    With `events_last` a block ends with an event rather than begins with it.
    """
    if not events.edits and not events.saves:
        return Blocks(T, None, triton.cdiv(length, T), per_chunk, length % T == 0)
    edits, saves = (np.asarray(e, dtype=np.int64) for e in (events.edits, events.saves))
    shift = 1 if events_last else 0
    begins = np.unique(np.concatenate([np.arange(0, length, T), edits + shift, saves + shift]))
    begins = begins[begins < length]
    table = np.full((len(begins), 4), -1, dtype=np.int32)
    table[:, 0] = begins
    table[:, 1] = np.diff(begins, append=length)
    for column, positions in ((2, edits), (3, saves)):
        table[np.searchsorted(begins, positions, side="right") - 1, column] = np.arange(len(positions))
    return Blocks(T, torch.from_numpy(table).to(device), len(begins), per_chunk, False)
