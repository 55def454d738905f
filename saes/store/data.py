"""From text to a store in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.models import HookedModel
from saes.options import OptionError, check_choice, check_number, from_mapping
from saes.store.blocks import BlockSource, DiskBlocks, ModelBlocks
from saes.store.capture import Capture
from saes.store.documents import END, ListedDocuments, StreamedDocuments, read_text_file
from saes.store.rows import DocumentRows, EveryNth, RowSource
from saes.store.shards import DTYPES, ShardReader
from saes.store.store import ActivationStore, capture_to_disk


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How text becomes batches of activations."""

    batch_size: int = 4096
    """Positions a batch."""
    context_length: int = 256
    """Tokens a row."""
    pack: bool = True
    """Documents one after the other, cut anywhere; False: one per row, padded."""
    boundaries: bool = False
    """Whether the model reads each document of a packed row from an empty memory; False: a row as one text."""
    epochs: int | None = None
    """Passes over the text; None: no end."""
    rows_per_pass: int = 16
    """Rows in one forward pass of the model."""
    block_tokens: int = 2**17
    """Positions that are shuffled together, and that a shard holds."""
    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose positions are left out. Padding always is."""
    positions_per_row: int | None = None
    """Random positions of a row to keep; None: all. For large sites such as hook_h."""
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Site -> channels (or heads) of it to keep, for large sites."""
    dtype: str = "bfloat16"
    """Of the stored activations."""
    folder: str | None = None
    """Where to keep them on disk; None: captured in memory during training."""
    disk_tokens: int | None = None
    """Positions kept on disk; needed with `folder`."""
    shards_per_block: int = 1
    """Shards that are read and shuffled together."""
    column: str = "text"
    """Of a `datasets` data set."""
    separator: str = END
    """Separates documents in a text file."""
    seed: int = 0
    """Of all orders and draws."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "context_length", "rows_per_pass", "block_tokens", "shards_per_block"):
            check_number(name, getattr(self, name), 1, whole=True)
        for name in ("epochs", "positions_per_row", "disk_tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, whole=True)
        check_number("seed", self.seed, 0, whole=True)
        check_choice("pack", self.pack, (True, False))
        check_choice("boundaries", self.boundaries, (True, False))
        check_choice("dtype", self.dtype, list(DTYPES))
        if (self.folder is None) != (self.disk_tokens is None):
            raise OptionError("folder and disk_tokens belong together: where activations are kept, and how many")
        if self.block_tokens < self.batch_size:
            raise OptionError(f"block_tokens ({self.block_tokens}) must be at least batch_size ({self.batch_size})")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """From a plain mapping; an unknown key is an error that names the nearest option."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, fit for JSON."""
        return dataclasses.asdict(self)


Text = str | Path | Sequence[Any] | Tensor | Iterable[Any] | RowSource
"""Path of a text file; list of texts or of rows of token ids; token tensor, n l or flat; iterable of texts, rows or
mappings (a `datasets` data set); rows made elsewhere."""


def rows_of(text: Text, model: HookedModel, config: DataConfig) -> RowSource:
    """Rows of tokens from any text.

    Raises
    ------
    TypeError
        If it is nothing that holds text.
    FileNotFoundError
        If a path leads nowhere.
    """
    if hasattr(text, "next_row"):
        return text  # type: ignore[return-value]  # a RowSource

    def encode(string: str) -> list[int]:
        return model._ids(string, prepend_bos=False)

    separator = model.eos_token_id if config.pack else None
    if isinstance(text, str | Path):
        text = read_text_file(text, config.separator)
    documents: Any
    if isinstance(text, Tensor):
        if text.ndim not in (1, 2):
            raise TypeError(f"token ids must be one row or several, [n, length]; got shape {list(text.shape)}")
        documents = ListedDocuments(list(torch.atleast_2d(text)), seed=config.seed)
        separator = None  # rows are taken as they are
    elif isinstance(text, Sequence):
        documents = ListedDocuments(text, encode, seed=config.seed)
    elif isinstance(text, Iterable):
        documents = StreamedDocuments(text, encode, column=config.column)
    else:
        raise TypeError(f"text must be a path, texts, token ids or a data set, got {type(text).__name__}")
    return DocumentRows(
        documents,
        config.context_length,
        pack=config.pack,
        separator=separator,
        epochs=config.epochs,
        boundaries=config.boundaries,
    )


def make_store(
    model: HookedModel,
    streams: Sequence[str],
    text: Text,
    config: DataConfig,
    *,
    rank: int = 0,
    world: int = 1,
) -> ActivationStore:
    """A store of these streams over any text.

    Parameters
    ----------
    model
        Run without gradients; stays as it is.
    streams
        See `saes.targets`.
    text
        See :data:`Text`.
    config
        How.
    rank, world
        This process and their number: each reads rows of its own.
    """
    if world > 1 and config.folder is None:
        rows: RowSource = EveryNth(rows_of(text, model, config), rank, world)
    else:
        rows = rows_of(text, model, config)
    capture = Capture(
        model,
        streams,
        positions_per_row=config.positions_per_row,
        channels=config.channels,
        exclude_tokens=config.exclude_tokens,
        dtype=DTYPES[config.dtype],
        device="cpu" if config.folder else None,
    )
    live = ModelBlocks(capture, rows, tokens=config.block_tokens, rows_per_pass=config.rows_per_pass, seed=config.seed)
    blocks: BlockSource = live
    if config.folder is not None:
        assert config.disk_tokens is not None  # checked with the config
        if rank == 0:
            capture_to_disk(live, config.folder, config.disk_tokens)
        _wait(world)
        reader = ShardReader(config.folder, list(streams))
        blocks = DiskBlocks(
            reader, shards=config.shards_per_block, epochs=config.epochs, seed=config.seed, rank=rank, world=world
        )
    return ActivationStore(blocks, config.batch_size, seed=config.seed, device=model.device)


def _wait(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
