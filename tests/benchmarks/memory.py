"""Memory that a call needs above what was there before it, as the operating system saw it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")


def peak_above(run: Callable[[], Any]) -> float | None:
    """MiB resident at the peak of `run()` above those before it; None where the system does not tell (not Linux).

    Run it in a process of its own: memory that was freed but not given back would hide what is needed.
    """
    if not (_SELF / "clear_refs").exists():
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that using it again counts
    except AttributeError:  # a C library without it
        return None
    (_SELF / "clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before) / 1024


def _status(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no field {field}")
