"""The activation store: shuffled batches of all streams, and a state from which they continue bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from saes.store.blocks import Block, BlockSource, ModelBlocks
from saes.store.capture import Capture
from saes.store.rows import RowSource, endless
from saes.store.shards import ShardWriter, StoreError, dtype_name

Batch = dict[str, Tensor]
"""Stream -> [batch, width], float32; row i is the same position in every stream."""


class ActivationStore:
    """Batches of activations, shuffled within blocks.

    A block is permuted and read to its end, but for a remainder smaller than a batch; then the next one is taken.
    The state is the cursor of the block's source, the block's number and the place in it: a resumed store makes the
    block again.

    Parameters
    ----------
    blocks
        Where blocks come from.
    batch_size
        Positions a batch.
    seed
        Of the permutations.
    device, dtype
        Of the batches; default: where the block is, float32.
    """

    def __init__(
        self,
        blocks: BlockSource,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.blocks, self.batch_size, self.seed, self.device, self.dtype = blocks, batch_size, seed, device, dtype
        self.number, self.place = 0, 0
        self._before: dict[str, Any] = blocks.state_dict()
        self._block: Block | None = None
        self._order: Tensor | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Stream -> width."""
        return self.blocks.widths

    @property
    def endless(self) -> bool:
        """Whether its source is known to have no end."""
        return endless(self.blocks)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises
        ------
        StopIteration
            At the end of the source.
        ValueError
            If a whole block is smaller than one batch.
        """
        while self._block is None or self.place + self.batch_size > len(self._rows()):
            if self._block is not None:
                self._leave_block()
            self._take_block()
        index = self._rows()[self.place : self.place + self.batch_size]
        self.place += self.batch_size
        return {name: self._out(value, index) for name, value in self._block.items()}

    def sample(self, n: int) -> Batch:
        """Up to n of the positions that come next; the cursor does not move.

        Raises
        ------
        ValueError
            At the end of the source.
        """
        if self._block is None or self.place + self.batch_size > len(self._rows()):
            if self._block is not None:
                self._leave_block()
            try:
                self._take_block()
            except StopIteration:
                raise ValueError("the store is exhausted: there is nothing to sample") from None
        assert self._block is not None
        index = self._rows()[self.place : self.place + n]
        return {name: self._out(value, index) for name, value in self._block.items()}

    def _out(self, value: Tensor, index: Tensor) -> Tensor:
        picked = value.index_select(0, index.to(value.device))
        return picked.to(device=self.device, dtype=self.dtype, non_blocking=True)

    def _rows(self) -> Tensor:
        assert self._order is not None
        return self._order

    def _take_block(self) -> None:
        self._before = self.blocks.state_dict()
        try:
            block = self.blocks.next_block()
        except BaseException:
            self.blocks.load_state_dict(self._before)  # as if it had not begun
            raise
        if block is None:
            raise StopIteration
        n = len(next(iter(block.values())))
        if n < self.batch_size and self.number == 0:
            raise ValueError(f"the source gave {n} positions at once, fewer than one batch of {self.batch_size}")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
        self._block, self._order = block, torch.randperm(n, generator=generator)

    def _leave_block(self) -> None:
        self._block = self._order = None
        self.number, self.place = self.number + 1, 0

    # State ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Its position: integers only, fit for JSON."""
        blocks = self.blocks.state_dict() if self._block is None else self._before
        return {"blocks": blocks, "number": self.number, "place": self.place, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state` was taken.

        Raises
        ------
        ValueError
            If that store shuffled by another seed.
        """
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of a store with seed {state['seed']}, this one has {self.seed}")
        self.blocks.load_state_dict(state["blocks"])
        self._block = self._order = None
        self.number, self.place = state["number"], state["place"]
        if self.place:
            self._take_block()

    def digest(self) -> str:
        """A fingerprint of the data and of how it is cut and shuffled."""
        text = f"{self.blocks.digest()} {self.batch_size} {self.seed} {self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def capture_to_memory(capture: Capture, rows: RowSource, n_tokens: int, *, rows_per_pass: int = 16) -> Block:
    """The first `n_tokens` positions of every stream, [n, width]; fewer where the text ends.

    Raises
    ------
    ValueError
        If there is none at all.
    """
    block = ModelBlocks(capture, rows, tokens=n_tokens, rows_per_pass=rows_per_pass).next_block()
    if block is None:
        raise ValueError("the text gave no position to capture")
    return {name: value[:n_tokens] for name, value in block.items()}


def capture_to_disk(
    blocks: ModelBlocks, folder: str | Path, n_tokens: int, *, model: HookedModel | None = None
) -> Path:
    """Capture at least `n_tokens` positions as shards, a block each; continues where an earlier call stopped.

    Parameters
    ----------
    blocks
        What to capture, and how many positions a shard holds.
    folder
        Of the store; made if need be.
    n_tokens
        Positions wanted in all. It may be raised later.
    model
        For its name and hash in the manifest; default: the one that is captured.

    Raises
    ------
    StoreError
        If the folder holds a store of something else, or the text ends before anything is captured.
    DiskFullError
        If there is no room; what is stored stays intact, and the same call continues later.
    """
    capture = blocks.capture
    model = model or capture.model
    about = {
        "streams": capture.widths,
        "dtype": dtype_name(capture.dtype),
        "model": model.cfg.model_name,
        "model_hash": model_hash(model),
        "context_length": blocks.rows.length,
        "positions_per_row": capture.positions_per_row,
        "channels": capture.channels,
        "exclude_tokens": list(capture.exclude_tokens),
        "source": blocks.digest(),
    }
    writer = ShardWriter(folder, about)
    if writer.manifest["cursor"] is not None:
        blocks.load_state_dict(writer.manifest["cursor"])
    while writer.tokens < n_tokens:
        block = blocks.next_block()
        if block is None:
            break
        writer.write(block, blocks.state_dict())
    if writer.tokens == 0:
        raise StoreError("the text gave no position to capture")
    return writer.folder
