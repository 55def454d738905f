"""Blocks: as many positions as are shuffled together, from a running model, from shards or from memory.

A source of blocks is resumed by its cursor alone: the block after a cursor is the same, bit for bit, whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saes.store.capture import Capture
from saes.store.rows import RowSource, endless, take
from saes.store.shards import ShardReader

Block = dict[str, Tensor]
"""Stream -> [n, width], one position a row."""


@runtime_checkable
class BlockSource(Protocol):
    """Where blocks come from."""

    widths: dict[str, int]
    """Stream -> width."""

    def next_block(self) -> Block | None:
        """The next block; None at the end."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def digest(self) -> str:
        """A fingerprint of what is read."""
        ...


def joined(parts: list[Block]) -> Block:
    """Blocks one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class ModelBlocks:
    """Captured on demand.

    Parameters
    ----------
    capture
        What to read of the model.
    rows
        Its text.
    tokens
        Positions of a block, at least; the last one may have fewer.
    rows_per_pass
        Rows in one forward pass.
    seed
        Of the positions kept, where not all are.
    """

    def __init__(
        self, capture: Capture, rows: RowSource, *, tokens: int = 2**17, rows_per_pass: int = 16, seed: int = 0
    ) -> None:
        if tokens < 1 or rows_per_pass < 1:
            raise ValueError(f"tokens and rows_per_pass must be at least 1, got {tokens} and {rows_per_pass}")
        self.capture, self.rows = capture, rows
        self.tokens, self.rows_per_pass, self.seed = tokens, rows_per_pass, seed
        self.block = 0
        self.widths = capture.widths
        self.endless = endless(rows)
        self.watch: Callable[[int, int], None] | None = None
        """Called after every forward pass with the positions so far and those wanted; it may raise to stop."""

    def next_block(self) -> Block | None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.block)
        parts: list[Block] = []
        found = 0
        while found < self.tokens:
            rows = take(self.rows, self.rows_per_pass)
            if rows is None:
                break
            parts.append(self.capture(rows, generator))
            found += len(next(iter(parts[-1].values())))
            if self.watch is not None:
                self.watch(found, self.tokens)
        self.block += 1
        return joined(parts) if found else None

    def state_dict(self) -> dict[str, Any]:
        return {"block": self.block, "rows": self.rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.block = state["block"]
        self.rows.load_state_dict(state["rows"])

    def digest(self) -> str:
        return f"model {self.tokens} {self.rows_per_pass} {self.seed} on {self.rows.digest()}"


class DiskBlocks:
    """A few shards of a store at a time, in a new order in every pass.

    Parameters
    ----------
    reader
        Of the store.
    shards
        Shards of a block.
    epochs
        Passes; None: no end.
    seed
        Of the orders.
    rank, world
        Every world-th shard only, from the rank-th on, for one of several processes.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        shards: int = 1,
        epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.reader, self.shards, self.epochs, self.seed = reader, shards, epochs, seed
        self.rank, self.world = rank, world
        if len(reader.shards) < world:
            raise ValueError(f"{world} processes cannot share {len(reader.shards)} shards")
        self.epoch, self.place = 0, 0
        self.widths = reader.widths

    def next_block(self) -> Block | None:
        if self.epochs is not None and self.epoch >= self.epochs:
            return None
        n = len(self.reader.shards) // self.world * self.world  # all processes get equally many
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.reader.shards))[:n]
        mine = order[self.rank :: self.world]
        parts = [self.reader.read(int(i)) for i in mine[self.place : self.place + self.shards]]
        self.place += self.shards
        if self.place >= len(mine):
            self.epoch, self.place = self.epoch + 1, 0
        return joined(parts)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]

    def digest(self) -> str:
        shards = [shard["sha256"][:8] for shard in self.reader.shards]
        return f"disk {self.shards} {self.seed} {self.rank} of {self.world}: {' '.join(shards)}"


class MemoryBlocks:
    """Everything in memory, as one block per pass.

    Parameters
    ----------
    values
        Stream -> [n, width].
    epochs
        Passes; None: no end.
    """

    def __init__(self, values: Block, *, epochs: int | None = None) -> None:
        sizes = {name: list(value.shape) for name, value in values.items()}
        if not values or len({size[0] for size in sizes.values()}) != 1 or any(len(s) != 2 for s in sizes.values()):
            raise ValueError(f"expected streams of one number of rows, [n, width] each; got {sizes}")
        self.values, self.epochs, self.epoch = values, epochs, 0
        self.widths = {name: value.shape[1] for name, value in values.items()}

    def next_block(self) -> Block | None:
        if self.epochs is not None and self.epoch >= self.epochs:
            return None
        self.epoch += 1
        return self.values

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]

    def digest(self) -> str:
        sums = [f"{name} {list(v.shape)} {float(v.sum(dtype=torch.float64)):.17g}" for name, v in self.values.items()]
        return "memory " + ", ".join(sums)
