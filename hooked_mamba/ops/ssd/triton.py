"""The scan of Mamba-2 on a GPU, in Triton; the kernels are imported at the first call."""

from __future__ import annotations

from typing import Any

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.triton_support import refusal


@backend("ssd", takes={"h0", "states", "grad", "edits"}, refuses=refusal)
def ssd(*arguments: Any, **options: Any) -> ScanOut:
    """See `hooked_mamba.ops.ssd`."""
    from hooked_mamba.ops.ssd import _triton_scan

    return _triton_scan.ssd(*arguments, **options)
