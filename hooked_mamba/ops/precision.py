"""In which precision a scan runs."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """Precision of the state: float64 if x is float64, else float32 (half loses the slow decays)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@overload
def to_state_dtype(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None, /
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...


@overload
def to_state_dtype(
    h: Tensor, x: Tensor, C: Tensor, D: Tensor | None, /
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...


def to_state_dtype(x: Tensor, /, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Convert the first and the others to the precision of the first one's state; None stays None."""
    dtype = state_dtype(x)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in (x, *others))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Precision of long sums whose differences are needed: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
