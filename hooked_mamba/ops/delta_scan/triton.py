"""The delta rule on a GPU, in Triton; the kernels are imported at the first call."""

from __future__ import annotations

from typing import Any

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import DeltaScanOut
from hooked_mamba.ops.triton_support import refusal


@backend("delta_scan", takes={"h0", "states", "grad"}, refuses=refusal)
def delta_scan(*arguments: Any, **options: Any) -> DeltaScanOut:
    """See `hooked_mamba.ops.delta_scan`."""
    from hooked_mamba.ops.delta_scan import _triton_scan

    return _triton_scan.delta_scan(*arguments, **options)
