"""How much memory a cache would take, asked before it is taken."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from hooked_mamba.config import SSMConfig
from hooked_mamba.positions import PositionSelect
from hooked_mamba.sites import site_bytes


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def check_cache_fits(
    cfg: SSMConfig,
    names: Sequence[str],
    states: Iterable[str],
    shape: Sequence[int],
    select: PositionSelect,
    itemsize: int,
    device: torch.device,
    copies: int = 1,
) -> None:
    """Raise MemoryError if the sites do not fit.

    Parameters
    ----------
    names, states
        Sites, and those of them that are single states, which have no position axis.
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
    single = set(states)
    sizes = {n: copies * site_bytes(n, cfg, batch, 1 if n in single else kept, itemsize) for n in names}
    needed, free = sum(sizes.values()), available_bytes(device)
    if free is None or needed <= free:
        return
    largest = max(sizes, key=sizes.__getitem__)
    raise MemoryError(
        f"this cache would take {needed / 2**30:.1f} GiB ({len(sizes)} sites, the largest {largest} with"
        f" {sizes[largest] / 2**30:.2f} GiB) and {free / 2**30:.1f} GiB are free on {device}."
        " Name fewer sites, choose positions with pos_slice, or give device= for where the cache should live"
    )
