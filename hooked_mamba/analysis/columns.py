"""Which columns of a pass are meant, also in generation, where every call holds only some of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mamba.analysis.captured import position_mask
from hooked_mamba.hooks.positions import PositionSelect
from hooked_mamba.hooks.root import HookedRoot
from hooked_mamba.state import Padding

Columns = int | slice | Iterable[int] | Tensor | None
"""One, several, a slice, a mask b l of bools (its own columns for each row), or None for all.

Positions t >= 0 count columns, padding included; a negative t counts from each row's own last real token, on whichever
side it is padded. In `generate`, t >= 0 and slices count from the prompt's first column, so that slice(n, None) begins
with the first new token behind a prompt of n; a negative t counts from the end of each call, so that -1 is meant every
time; a mask is for the prompt.
"""


def kept(columns: Columns) -> Columns:
    """Columns as something that can be iterated more than once."""
    return columns if columns is None or isinstance(columns, int | slice | Tensor) else [int(t) for t in columns]


def columns_before(model: HookedRoot) -> int | None:
    """Columns of earlier calls while `generate` runs; None outside of it."""
    return getattr(model, "columns_before", None)


def column_mask(
    columns: Columns,
    batch: int,
    length: int,
    before: int | None,
    device: torch.device,
    padding: Padding | None = None,
) -> Bool[Tensor, "b l"] | None:
    """The columns of this call that are meant; None: all.

    Parameters
    ----------
    before
        Columns of earlier calls, see :func:`columns_before`.
    padding
        Of this call; negative positions count from the last real token of each row.

    Raises
    ------
    IndexError
        A column that does not exist (outside of `generate`, where another call may hold it), or more positions back
        than a padded row has real tokens.
    ValueError
        A mask of another shape; a negative slice in `generate`, or over rows padded on the right.
    """
    if columns is None:
        return None
    if isinstance(columns, slice):
        if before is None:
            PositionSelect(columns, "positions").check_padding(None if padding is None else padding.mask)
            return _these(range(length)[columns], batch, length, device)
        if any(bound is not None and bound < 0 for bound in (columns.start, columns.stop, columns.step)):
            raise ValueError(f"while generating there is no end yet to count from: {columns}")
        start, step = columns.start or 0, columns.step or 1
        end = before + length
        stop = end if columns.stop is None else min(columns.stop, end)
        return _these([t - before for t in range(start, stop, step)], batch, length, device)
    is_mask = isinstance(columns, Tensor) and columns.dtype == torch.bool
    if before is None or (is_mask and before == 0):
        return position_mask(columns, batch, length, device, padding)
    if is_mask:
        return _these([], batch, length, device)
    if isinstance(columns, Tensor):
        columns = columns.reshape(-1).tolist()
    chosen = [columns] if isinstance(columns, int) else [int(t) for t in columns]
    if padding is None:
        return _these([t - before if t >= 0 else t + length for t in chosen], batch, length, device)
    mask = _these([t - before for t in chosen if t >= 0], batch, length, device)
    backward = [t for t in chosen if t < 0]
    return mask | position_mask(backward, batch, length, device, padding) if backward else mask


def _these(columns: Iterable[int], batch: int, length: int, device: torch.device) -> Tensor:
    mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
    inside = [t for t in columns if 0 <= t < length]
    mask[:, inside] = True
    return mask
