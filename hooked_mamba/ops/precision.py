"""In which precision a scan runs."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """Precision of the state: float64 if x is float64, else float32 (half loses the slow decays)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_state_dtype(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Convert x and the others to the precision of the state; None stays None."""
    dtype = state_dtype(x)
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in (x, *others)]


def wide_dtype(x: Tensor) -> torch.dtype:
    """Precision of long sums whose differences are needed: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
