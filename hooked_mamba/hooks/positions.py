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
        """Whether all positions are kept."""
        return self.spec is None or self.spec == slice(None)

    @property
    def keeps_axis(self) -> bool:
        """False where one int was asked for, which drops the position axis."""
        return not isinstance(self.spec, int)

    @property
    def counts_from_end(self) -> bool:
        """Whether any position is negative, and so stands for different columns in rows that end at different ones."""
        if isinstance(self.spec, slice):
            return any(bound is not None and bound < 0 for bound in (self.spec.start, self.spec.stop, self.spec.step))
        return self.spec is not None and min([self.spec] if isinstance(self.spec, int) else self.spec, default=0) < 0

    def check_padding(self, mask: Tensor | None) -> None:
        """Refuse negative positions if a row's last tokens are not in the last columns.

        Parameters
        ----------
        mask
            b l, True at real tokens; None where all are real.

        Raises
        ------
        ValueError
            Rows are padded on the right, so that -1 is padding in some of them.
        IndexError
            A row padded on the left has fewer real tokens than a position counts back.
        """
        if mask is None or not self.counts_from_end:
            return
        asked = f"{self.argument}={self.spec!r} counts from the end"
        if not bool(mask[:, -1].all()):
            raise ValueError(
                f"{asked}, but rows of this batch are padded on the right, where that is padding: pad on the left"
                " (padding_side='left'), which puts every row's last token into the last column, or give columns"
                " from 0 up"
            )
        real = int(mask.sum(1).min())
        if not isinstance(self.spec, slice):
            low = min([self.spec] if isinstance(self.spec, int) else self.spec)  # type: ignore[list-item,arg-type]
            if low < -real:
                raise IndexError(f"{asked}, and a row of this batch has {real} real tokens")

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
