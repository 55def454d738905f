"""How much memory a cache would take, checked before the pass."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.hooks.positions import PositionSelect

KEEP_BYTES = 2**31
"""Freed memory that stays with the process for the next call, at most."""


def keep_freed_memory(nbytes: int = KEEP_BYTES) -> bool:
    """Let the C library (glibc) keep freed memory for the next call; returns whether it does.

    A cache of all default sites of a 130m-sized model at 256 positions is half a gigabyte. By default glibc returns
    such memory to the system as soon as it is freed, and the next call pays a page fault for every 4 KiB of it: a third
    of a forward pass. Models call this once when they are created on a CPU, as torch's own allocator keeps memory on a
    GPU. It does nothing outside of Linux with glibc, if the environment sets MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES
    itself, or with HOOKED_MAMBA_KEEP_MEMORY=0.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or os.environ.get("HOOKED_MAMBA_KEEP_MEMORY") == "0":
        return False
    if any(name in os.environ for name in chosen):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_TRIM_THRESHOLD, ... of malloc.h
    settings = {
        trim_threshold: min(nbytes, 2**31 - 1),
        top_pad: 2**28,  # grow by so much at once, which costs nothing until it is touched: room for large logits
        mmap_threshold: 2**25,  # the most that glibc takes; what is larger is mapped again where the heap has no room
    }
    return all(mallopt(name, value) for name, value in settings.items())


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [n for n in (_of_machine(), _of_container()) if n is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    """What the kernel reports as available without swapping; all memory if it does not say."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit (cgroup version 2) leaves; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            return max(0, int(limit) - int((folder / "memory.current").read_text()))
    return None


def check_cache_fits(
    points: Iterable[HookPoint],
    shape: Sequence[int],
    select: PositionSelect,
    itemsize: int,
    device: torch.device,
    copies: int = 1,
) -> None:
    """Raise MemoryError if the sites do not fit.

    Parameters
    ----------
    points
        The sites; those that no module declares count as zero.
    shape
        Batch and positions.
    select
        Positions that are kept.
    itemsize
        Bytes of a number in the model's dtype.
    copies
        2 where gradients are kept as well.
    """
    batch, length = shape
    index = select.index(length)
    kept = length if isinstance(index, slice) else len(index)
    sizes = {p.site.name: copies * p.site.nbytes(batch, kept, itemsize, length) for p in points if p.site is not None}
    needed, free = sum(sizes.values()), available_bytes(device)
    if free is None or needed <= free:
        return
    largest = max(sizes, key=sizes.__getitem__)
    raise MemoryError(
        f"this cache would take {needed / 2**30:.1f} GiB ({len(sizes)} sites, the largest {largest} with"
        f" {sizes[largest] / 2**30:.2f} GiB) and {free / 2**30:.1f} GiB are free on {device}."
        " Name fewer sites, or choose positions with pos_slice=, or give device= for where the cache should live"
    )
