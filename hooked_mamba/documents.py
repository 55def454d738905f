"""Documents packed into one row: where each begins, and what a mixer needs to keep them apart.

A mixer carries three things from position to position, and each starts anew with a document:
1. a state, which `hooked_mamba.mixers.states` sets to zero between documents;
2. taps of a convolution or a token shift, which see zeros before each document (:func:`restarted`);
3. keys, which only queries of the same document see, and positions, which count from each document's start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch.

    `starts` is True at the first column of every document but a row's first, which continues an initial state if the
    call has one.
    """

    starts: Bool[Tensor, "b l"]

    @classmethod
    def from_ids(
        cls, document_ids: Any, shape: tuple[int, int], mask: Bool[Tensor, "b l"] | None, device: torch.device
    ) -> Documents | None:
        """Check ids, a tensor or lists b l of integers; None where every row is one document.

        Raises
        ------
        TypeError
            They are no integers.
        ValueError
            They have another shape than the tokens.
        """
        ids = torch.as_tensor(document_ids, device=device)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"document_ids must be integers, one for each token, got {ids.dtype}")
        if tuple(ids.shape) != tuple(shape):
            raise ValueError(f"document_ids is {list(ids.shape)}, expected {list(shape)} like the tokens")
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if mask is not None:  # ids of padding say nothing
            starts[:, 1:] &= mask[:, 1:] & mask[:, :-1]
        return cls(starts) if bool(starts.any()) else None

    def to(self, device: torch.device) -> Documents:
        """The same on another device."""
        return Documents(self.starts.to(device))

    @property
    def number(self) -> Int[Tensor, "b l"]:
        """Which of its row's documents each column belongs to, from 0."""
        return self.starts.long().cumsum(1)

    @property
    def in_last(self) -> Bool[Tensor, "b l"]:
        """Columns of each row's last document."""
        number = self.number
        return number == number[:, -1:]

    @property
    def first_column(self) -> Int[Tensor, "b l"]:
        """The column where each column's document starts; 0 in a row's first."""
        columns = torch.arange(self.starts.shape[1], device=self.starts.device)
        return torch.where(self.starts, columns, torch.zeros_like(columns)).cummax(1).values

    def ends(self) -> dict[int, Bool[Tensor, " b"]]:
        """Columns (ascending) after which a document starts in some row -> those rows."""
        columns = self.starts.any(0).nonzero().flatten().tolist()
        return {column - 1: self.starts[:, column] for column in columns}

    def cumsum(self, x: Float[Tensor, "b l H S"], start: Float[Tensor, "b H S"] | None) -> Float[Tensor, "b l H S"]:
        """Sums of x over the positions of each document; a row's first one goes up from `start`."""
        total = torch.cat([torch.zeros_like(x[:, :1]), x.cumsum(1)], 1)
        rest = (1,) * (x.ndim - 2)
        first = self.first_column.reshape(*self.starts.shape, *rest)
        total = total[:, 1:] - total.gather(1, first.expand(x.shape))
        if start is None:
            return total
        return total + torch.where((self.number == 0).reshape(first.shape), start.unsqueeze(1), 0)

    def keep_last(self, x: Float[Tensor, "b l *rest"]) -> Float[Tensor, "b l *rest"]:
        """x with zeros outside of each row's last document."""
        keep = self.in_last.reshape(*self.starts.shape, *(1,) * (x.ndim - 2))
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def zero_starts(self, x: Float[Tensor, "b l *rest"]) -> Float[Tensor, "b l *rest"]:
        """x with zeros where a document starts."""
        starts = self.starts.reshape(*self.starts.shape, *(1,) * (x.ndim - 2))
        return torch.where(starts, torch.zeros((), dtype=x.dtype, device=x.device), x)


Taps = Callable[[Float[Tensor, "b m c"], Float[Tensor, "b k c"] | None], Float[Tensor, "b l o"]]
"""(inputs, the k before them or None where they are in front of the inputs) -> outputs of a causal convolution."""


def restarted(
    documents: Documents | None, k: int, run: Taps, x: Float[Tensor, "b m c"], history: Float[Tensor, "b k c"] | None
) -> Float[Tensor, "b l o"]:
    """A causal convolution that reads k inputs back, but none of another document.

    The first k outputs of every document are computed from its own inputs, with zeros in front.
    """
    y = run(x, history)
    if documents is None or k == 0:
        return y
    length = documents.starts.shape[1]
    own, short = x[:, x.shape[1] - length :], y[:, : y.shape[1] - length]
    rows, columns = documents.starts.nonzero(as_tuple=True)
    columns = columns[:, None] + torch.arange(k, device=x.device)
    within = columns < length
    columns = columns.clamp(max=length - 1)
    rows = rows[:, None].expand_as(columns)
    number = documents.number
    within &= number[rows, columns] == number[rows[:, :1], columns[:, :1]]
    windows = own[rows, columns]
    fresh = run(windows, torch.zeros_like(windows))
    y = y[:, y.shape[1] - length :].index_put((rows[within], columns[within]), fresh[:, fresh.shape[1] - k :][within])
    return torch.cat([short, y], 1)
