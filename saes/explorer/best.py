"""The n largest of many entries in each group, in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor


def best_of_groups(
    groups: Int[Tensor, " m"], keys: Float[Tensor, " m"], n: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
    """Which entries have the n largest keys of their group, and their ranks.

    Sorted by group, the largest first; of equals the earlier entry.
    """
    order = keys.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    grouped = groups[order]
    places = torch.arange(len(order))
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = grouped[1:] != grouped[:-1]
    starts = torch.where(first, places, 0).cummax(0).values
    ranks = places - starts
    kept = ranks < n
    return order[kept], ranks[kept]


class Best:
    """For each of F groups, the n entries with the largest keys so far, each with its data.

    Parameters
    ----------
    F, n
        Groups, and entries kept of each.
    fields
        Name -> (shape of one entry's value, dtype, what empty places hold).
    """

    def __init__(self, F: int, n: int, fields: dict[str, tuple[tuple[int, ...], torch.dtype, float | int]]) -> None:
        self.n = n
        self.keys = torch.full((F, n), -torch.inf, dtype=torch.float64)
        self.fields = {name: torch.full((F, n, *s), fill, dtype=dtype) for name, (s, dtype, fill) in fields.items()}

    def hopeful(self, groups: Int[Tensor, " m"], keys: Float[Tensor, " m"]) -> Int[Tensor, " kept"]:
        """Which of these entries could still enter; :meth:`add` takes no others."""
        if self.n == 0 or len(groups) == 0:
            return torch.zeros(0, dtype=torch.long)
        beats = (keys > self.keys[groups, -1]).nonzero().squeeze(1)
        kept, _ = best_of_groups(groups[beats], keys[beats], self.n)
        return beats[kept]

    def add(self, groups: Int[Tensor, " m"], keys: Float[Tensor, " m"], values: dict[str, Tensor]) -> None:
        """Enter what :meth:`hopeful` chose. `values` has one row an entry."""
        if len(groups) == 0:
            return
        kept, ranks = best_of_groups(groups, keys, self.n)
        touched, row = groups[kept].unique(return_inverse=True)
        new_keys = torch.full((len(touched), self.n), -torch.inf, dtype=torch.float64)
        new_keys[row, ranks] = keys[kept]
        fields = {}
        for name, held in self.fields.items():
            fields[name] = torch.zeros_like(held[touched])
            fields[name][row, ranks] = values[name][kept].to(held.dtype)
        self.merge(new_keys, fields, touched)

    def merge(
        self, keys: Float[Tensor, "m n"], fields: Mapping[str, Tensor], groups: Int[Tensor, " m"] | None = None
    ) -> None:
        """Enter n entries of each of some groups (None: all), such as those of another one; of equals one's own stay.

        Parameters
        ----------
        keys
            -inf at empty places.
        fields
            Name -> m n ...
        """
        if self.n == 0:
            return
        groups = torch.arange(len(self.keys)) if groups is None else groups
        both = torch.cat([self.keys[groups], keys], 1)
        order = both.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        self.keys[groups] = both.gather(1, order)
        for name, held in self.fields.items():
            old = held[groups]
            index = order.reshape(*order.shape, *[1] * (old.ndim - 2)).expand_as(old)
            held[groups] = torch.cat([old, fields[name]], 1).gather(1, index)
