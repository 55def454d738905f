"""Rows of effects while a graph is built: in memory, or in a file where they are too many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.memory import available_bytes

BLOCK = 64
"""Rows that are looked at together."""


class EffectRows:
    """What each traced node is made of: one row of effects a node, by the node's own column.

    Parameters
    ----------
    columns, most
        Columns of a row, and how many rows there may be.
    dtype
        Of the effects.
    offload
        A folder for a file that holds the rows and is deleted with this object; None: memory.

    Raises
    ------
    MemoryError
        The rows would not fit into memory; says what to do.
    """

    def __init__(self, columns: int, most: int, dtype: torch.dtype, offload: str | Path | None = None) -> None:
        self.places: list[int] = []
        self.values: list[float] = []
        self._file = None
        if offload is None:
            _check_fits(columns, most, dtype)
            self._rows = torch.empty(most, columns, dtype=dtype)
        else:
            self._file = tempfile.NamedTemporaryFile(dir=Path(offload), prefix="effects-")  # noqa: SIM115
            size = most * columns
            self._file.truncate(max(1, size) * torch.empty(0, dtype=dtype).element_size())
            flat = torch.from_file(self._file.name, shared=True, size=size, dtype=dtype)
            self._rows = flat.reshape(most, columns)
        self._sizes = torch.empty(most, dtype=dtype)
        self._among = torch.empty(most, most, dtype=dtype)

    def __len__(self) -> int:
        return len(self.places)

    def add(self, places: list[int], rows: Float[Tensor, "n m"], values: Float[Tensor, " n"]) -> None:
        """Rows of some nodes, and the nodes' own values."""
        start, stop = len(self), len(self) + len(places)
        self._rows[start:stop] = rows
        sizes = rows.abs()
        self._sizes[start:stop] = sizes.sum(1).clamp_min(1e-30)
        self.places += places
        self._among[start:stop, :stop] = sizes[:, self.places]
        self._among[:start, start:stop] = self._rows[:start][:, places].abs()
        self.values += values.tolist()

    def blocks(self) -> Iterator[tuple[list[int], Float[Tensor, "n m"]]]:
        """Some nodes and their rows at a time."""
        for start in range(0, len(self), BLOCK):
            stop = min(start + BLOCK, len(self))
            yield self.places[start:stop], self._rows[start:stop]

    def reach(self, effects: Float[Tensor, "n m"], weight: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """Influence of all columns on targets, as far as rows are known: a node without a row passes nothing on.

        Parameters
        ----------
        effects, weight
            The targets' own rows, and how much each target counts.
        """
        sizes = effects.abs()
        total = weight.to(effects.dtype) @ (sizes / sizes.sum(1, keepdim=True).clamp_min(1e-30))
        n = len(self)
        if not n:
            return total
        # What goes round among the traced nodes is settled between them alone; all columns are then read once.
        arriving, passed = total[self.places], torch.zeros_like(self._sizes[:n])
        while bool(arriving.any()):
            entering = arriving / self._sizes[:n]
            passed += entering
            arriving = entering @ self._among[:n, :n]
        for start, (places, block) in zip(range(0, n, BLOCK), self.blocks(), strict=True):
            total += passed[start : start + len(places)] @ block.abs()
        return total


def _check_fits(columns: int, rows: int, dtype: torch.dtype) -> None:
    needed, free = columns * rows * torch.finfo(dtype).bits // 8, available_bytes(torch.device("cpu"))
    if free is not None and needed > free // 2:
        raise MemoryError(
            f"{rows} rows of {columns} effects would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free:"
            " lower max_features or max_heads, shorten the prompt, or keep the rows in a file (offload=FOLDER)"
        )
