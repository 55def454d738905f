"""Compiling numba kernels at their first call, keeping them on disk, and sharing their work among threads."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

WORTH_A_THREAD = 1 << 18
"""Units of work (one exponential, about) below which a further thread costs more than it saves."""


def _cache_folder() -> str | None:
    """Where compiled kernels are kept: the user's cache, apart for every version of the sources."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # numba looks at the age of a kernel's own file alone, and would miss a change of the lanes.
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*numba*.py")))
    folder = root / "hooked_mamba" / f"numba-{hashlib.sha256(sources).hexdigest()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


def part(function: Callable) -> Callable:
    """A piece of kernels, compiled into each of them."""
    return numba.njit(nogil=True, error_model="numpy", boundscheck=False, forceinline=True)(function)


def kernel(function: Callable) -> Callable:
    """Compile at the first call, and keep the result on disk (in NUMBA_CACHE_DIR if that is set)."""
    settings: Any = numba.config  # its attributes are made when it is imported
    before = settings.CACHE_DIR
    folder = before or _cache_folder()
    try:
        settings.CACHE_DIR = folder or ""
        return numba.njit(nogil=True, error_model="numpy", boundscheck=False, cache=folder is not None)(function)
    finally:
        settings.CACHE_DIR = before


def refusal(x: Tensor, probe: Callable[[], object]) -> str | None:
    """Why numba's kernels cannot run on x; None if they can. `probe` compiles them."""
    if x.device.type != "cpu":
        return f"it runs on the CPU and x is on {x.device}"
    if x.dtype == torch.float64:
        return "it computes in float32 and x is float64"
    return broken(probe)


@cache
def broken(probe: Callable[[], object]) -> str | None:
    """Try kernels once: a version of numba that does not fit shows here, at compilation."""
    try:
        probe()
    except Exception as error:
        reason = f"numba failed to compile it ({type(error).__name__}: {str(error).splitlines()[0]})"
        warnings.warn(f"the numba scan is left out: {reason}", stacklevel=2)
        return reason
    return None


def threads_for(units: int, work: int) -> int:
    """As many as torch would use, but no more than there are units, and only where the work is worth them."""
    return max(1, min(torch.get_num_threads(), units, work // WORTH_A_THREAD))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's, so it makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hooked-mamba")


def share(function: Callable, units: int, work: int, before: tuple, *after: tuple) -> None:
    """Run function(*before, *after[i], lo, hi) over all units, thread i with its own `after`, or the only one."""
    threads = threads_for(units, work)
    if threads == 1:
        function(*before, *(after[0] if after else ()), 0, units)
        return
    cuts = [units * i // threads for i in range(threads + 1)]
    calls = [(*before, *after[i % len(after)], *cuts[i : i + 2]) for i in range(threads)]
    others = [_pool(os.getpid(), threads - 1).submit(function, *call) for call in calls[1:]]
    function(*calls[0])
    for other in others:
        other.result()
