"""Weights that are made when they are read: their shapes without making them, and taking them over without a copy.

A dequantised weight costs time each time it is asked for. Whoever wants shapes alone asks inside
:func:`only_shapes`, and gets tensors on the meta device that went through the same slices and reshapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["fresh", "is_fresh", "only_shapes", "shapes_only"]

_ONLY_SHAPES: ContextVar[bool] = ContextVar("only_shapes", default=False)
_MARK = "_hooked_mamba_fresh"


@contextmanager
def only_shapes() -> Iterator[None]:
    """Readers that make their tensors give them without numbers in here."""
    token = _ONLY_SHAPES.set(True)
    try:
        yield
    finally:
        _ONLY_SHAPES.reset(token)


def shapes_only() -> bool:
    """Whether numbers are not wanted."""
    return _ONLY_SHAPES.get()


def fresh(tensor: Tensor) -> Tensor:
    """Mark a tensor that was made for this one reader: it may be kept as it is. Any operation on it drops the mark."""
    setattr(tensor, _MARK, True)
    return tensor


def is_fresh(tensor: Tensor) -> bool:
    """Whether nobody else holds the tensor's memory."""
    return getattr(tensor, _MARK, False)
