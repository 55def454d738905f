"""Fresh memory for large results.

The first write to a fresh page of 4 KB costs more than writing it: for all states of a scan, most of the time. So
large results ask the kernel for pages of 2 MB, where it offers them. The memory is given back with the tensor.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

LARGE = 8 << 20
"""Bytes from which huge pages are asked for."""


def fresh(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised contiguous tensor with the type and device of `like`."""
    size = math.prod(shape) * like.element_size()
    if size < LARGE or like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # Without huge pages the memory is as good as any other.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
