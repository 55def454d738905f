"""Choosing positions of a sequence: what `pos_slice` means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

PosSlice = int | np.integer | slice | Sequence[int] | np.ndarray | Tensor | None
"""An int drops the position axis; a slice, list or index tensor keeps it; None takes all."""


class PositionSelect:
    """Positions of axis 1, resolved when the length is known."""

    def __init__(self, pos_slice: PosSlice = None, argument: str = "pos_slice", unit: str = "position") -> None:
        self.argument, self.unit = argument, unit
        if isinstance(pos_slice, Tensor | np.ndarray | np.integer):
            pos_slice = pos_slice.tolist()
        if isinstance(pos_slice, tuple):  # TransformerLens' Slice takes (start, stop) and (start, stop, step)
            pos_slice = slice(*pos_slice)
        if not (pos_slice is None or isinstance(pos_slice, int | slice | list | range)):
            raise TypeError(f"{argument} must be an int, slice, list of ints or None, got {type(pos_slice).__name__}")
        self.spec: int | slice | Sequence[int] | None = pos_slice

    @property
    def everything(self) -> bool:
        """Whether no choice was made."""
        return self.spec is None or self.spec == slice(None)

    @property
    def keeps_axis(self) -> bool:
        """False where one int was asked for, which drops the position axis."""
        return not isinstance(self.spec, int)

    def index(self, length: int) -> list[int] | slice:
        """The positions as an index of axis 1: a list of non-negative ints, or `slice(None)` for all of them."""
        if self.everything:
            return slice(None)
        if isinstance(self.spec, slice):
            return list(range(length))[self.spec]
        chosen = [self.spec] if isinstance(self.spec, int) else list(self.spec)  # type: ignore[arg-type]
        for t in chosen:
            if not -length <= t < length:
                raise IndexError(f"{self.argument}: {self.unit} {t} is out of range for {length} {self.unit}s")
        return [t % length for t in chosen]

    def finish(self, values: Tensor, axis: int = 1) -> Tensor:
        """Drop the position axis of already selected values where one int was asked for."""
        return values.select(axis, 0) if isinstance(self.spec, int) else values

    def apply(self, values: Tensor, axis: int = 1) -> Tensor:
        """Select from the full value of a site, whose positions are its second axis unless `axis` says otherwise."""
        if self.everything:
            return values
        before = (slice(None),) * axis
        return self.finish(values[(*before, self.index(values.shape[axis]))], axis)
