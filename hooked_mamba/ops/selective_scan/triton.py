"""The selective scan on a GPU, in Triton; the kernels are imported at the first call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.triton_support import refusal


@backend("selective_scan", takes={"h0", "states", "grad", "edits"}, refuses=refusal)
def selective_scan(*arguments: Any, **options: Any) -> ScanOut:
    """See `hooked_mamba.ops.selective_scan`."""
    from hooked_mamba.ops.selective_scan import _triton_scan

    return _triton_scan.selective_scan(*arguments, **options)


@backend("gated_scan", takes={"h0", "grad"}, refuses=refusal)
def gated_scan(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """See `hooked_mamba.ops.gated_scan`."""
    from hooked_mamba.ops.selective_scan import _triton_scan

    return _triton_scan.gated_scan(*arguments, **options)
