"""The state of attention: keys and values of every column so far, in buffers that grow by doubling.

1. A state is the first m columns of a buffer, which may be longer.
2. The state that ends where the written part of the buffer ends appends in place.
3. Any other (an earlier one used a second time, a copy, selected rows) first gets its own buffer.

So two continuations of one state never see each other's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hooked_mamba.state import loadable


class _Columns(NamedTuple):
    k: Tensor
    v: Tensor
    real: Tensor


class Buffer:
    """Columns with room for more."""

    def __init__(self, start: Sequence[Tensor], room: int) -> None:
        self.end = start[0].shape[1]
        self.columns = [t.new_empty(len(t), self.end + room, *t.shape[2:]) for t in start]
        for column, t in zip(self.columns, start, strict=True):
            column[:, : self.end] = t

    def append(self, new: Sequence[Tensor]) -> list[Tensor]:
        """Append `new`, and return everything up to its end."""
        end = self.end + new[0].shape[1]
        for column, t in zip(self.columns, new, strict=True):
            column[:, self.end : end] = t
        self.end = end
        return [column[:, :end] for column in self.columns]

    def takes(self, new: Sequence[Tensor]) -> bool:
        """Whether there is room, and the tensors are of the same kind."""
        same = all((c.dtype, c.device) == (t.dtype, t.device) for c, t in zip(self.columns, new, strict=True))
        return same and self.end + new[0].shape[1] <= self.columns[0].shape[1]


@loadable
class KVState(_Columns):  # a subclass, since a named tuple has no attributes beside its fields
    """Memory of attention: the keys and values of all columns so far, padded ones included.

    k, v
        Keys as the scores read them (turned, where there are positions), and values, b m J c.
    real
        Which columns hold real tokens, b m.
    """

    buffer: Buffer | None = None
    """Where its columns stand; None: on their own, as of a state that was copied or of which rows were chosen."""
    whole: bool | None = None
    """Whether all columns are real; None: not looked at yet."""

    def __reduce__(self) -> tuple[type[KVState], tuple[Tensor, ...]]:
        return KVState, tuple(self)  # a copy has columns of its own, and no room behind them

    def all_real(self) -> bool:
        """Whether no column is padding."""
        if self.whole is None:
            self.whole = bool(self.real.all())
        return self.whole


def remember(state: Sequence[Tensor] | None, new: KVState) -> KVState:
    """The state with this call's columns appended."""
    if state is None:
        return new
    whole = isinstance(state, KVState) and state.all_real() and new.all_real()
    before = [t.to(like.dtype) for t, like in zip(state, new, strict=True)]
    if torch.is_grad_enabled():  # backward needs every call's columns as they were
        grown = KVState(*(torch.cat([old, more], 1) for old, more in zip(before, new, strict=True)))
        grown.whole = whole
        return grown
    buffer = getattr(state, "buffer", None)
    if buffer is None or buffer.end != state[0].shape[1] or not buffer.takes(new):
        length = before[0].shape[1]
        buffer = Buffer(before, max(length, 32) + new.k.shape[1])
    grown = KVState(*buffer.append(new))
    grown.buffer, grown.whole = buffer, whole
    return grown
