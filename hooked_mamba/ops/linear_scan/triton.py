"""The first-order recurrence on a GPU, in Triton; the kernels are imported at the first call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.triton_support import refusal


@backend("linear_scan", takes={"h0", "grad"}, refuses=refusal)
def linear_scan(*arguments: Any, **options: Any) -> Tensor:
    """See `hooked_mamba.ops.linear_scan`."""
    from hooked_mamba.ops.linear_scan import _triton_scan

    return _triton_scan.linear_scan(*arguments, **options)
