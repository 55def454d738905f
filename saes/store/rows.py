"""Rows of tokens for the model, with a cursor: documents packed one after the other, one per row, or a mix of sources.

A cursor is a few integers and never holds text, so a store or a checkpoint can save it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mamba.documents import Documents as Packed
from hooked_mamba.state import Padding
from saes.store.documents import Documents
from saes.windows import Beginnings

Row = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Tokens, their mask, and where documents are kept apart the document of each token; l each."""


class Rows(NamedTuple):
    """Some rows of tokens."""

    tokens: Int[Tensor, "b l"]
    real: Bool[Tensor, "b l"]
    """False at padding."""
    document_ids: Int[Tensor, "b l"] | None = None
    """Which document each token is of, where the model must keep them apart; None: a row is read as one."""

    @classmethod
    def stack(cls, rows: Sequence[Row]) -> Rows:
        """Of single rows, their masks and their ids of documents; a row without ids is one document."""
        ids = None
        if any(len(row) > 2 for row in rows):
            ids = torch.stack([row[2] if len(row) > 2 else torch.zeros_like(row[0]) for row in rows])
        return cls(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]), ids)

    def columns(self, chosen: slice) -> Rows:
        """Some columns."""
        return Rows(*(None if part is None else part[:, chosen] for part in self))  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator[Rows]:
        """At most `size` rows at a time."""
        for start in range(0, len(self.tokens), size):
            yield Rows(*(None if part is None else part[start : start + size] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def arguments(self) -> dict[str, Any]:
        """What a model is told beside the tokens."""
        mask = None if bool(self.real.all()) else self.real
        return {"attention_mask": mask} | ({} if self.document_ids is None else {"document_ids": self.document_ids})

    def beginnings(self) -> Beginnings:
        """Where the texts begin, for what reads windows of positions."""
        padding = Padding.from_mask(self.real.long(), self.real.shape)
        if self.document_ids is None:
            return Beginnings(padding)
        ids, mask = self.document_ids, None if padding is None else padding.mask
        return Beginnings(padding, Packed.from_ids(ids, (ids.shape[0], ids.shape[1]), mask, ids.device))

    @property
    def starts(self) -> Bool[Tensor, "b l"] | None:
        """Where a document starts behind another; None where rows are read as one."""
        if self.document_ids is None:
            return None
        starts = torch.zeros_like(self.real)
        starts[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        return starts


@runtime_checkable
class RowSource(Protocol):
    """Rows in order, from a cursor that can be saved and restored."""

    length: int

    def next_row(self) -> Row | None:
        """The next row of tokens and its mask, l each; None at the end."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def digest(self) -> str: ...


def take(source: RowSource, n: int) -> Rows | None:
    """Up to n rows; None at the end of the source."""
    rows: list[Row] = []
    while len(rows) < n:
        row = source.next_row()
        if row is None:
            break
        rows.append(row)
    return Rows.stack(rows) if rows else None


def endless(source: object) -> bool:
    """Whether a source of rows, blocks or batches is known to have no end; one that does not say is taken to end."""
    return bool(getattr(source, "endless", getattr(source, "epochs", 1) is None))


class DocumentRows:
    """Rows made of documents.

    Parameters
    ----------
    documents
        Where they come from.
    length
        Tokens a row.
    pack
        True: documents stand one after the other and rows are cut anywhere, so that no position is wasted. False:
        one document a row, cut at `length` or padded.
    separator
        Token id in front of every document, such as `<|endoftext|>`; None: nothing.
    epochs
        Passes over the documents; None: no end.
    boundaries
        Whether the rows say where a document starts, so that the model reads each from an empty memory.
    """

    def __init__(
        self,
        documents: Documents,
        length: int,
        *,
        pack: bool = True,
        separator: int | None = None,
        epochs: int | None = None,
        boundaries: bool = False,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None for no end; got {epochs}")
        self.documents, self.length, self.pack, self.separator, self.epochs = documents, length, pack, separator, epochs
        self.boundaries = boundaries
        self.epoch, self.document, self.offset = 0, 0, 0
        """The cursor: the pass, the next document, and how much of it is read."""
        self._open: Iterator[Tensor] | None = None
        self._rest: Tensor | None = None

    def next_row(self) -> Row | None:
        tokens = torch.zeros(self.length, dtype=torch.long)
        ids = torch.zeros(self.length, dtype=torch.long)
        real = torch.zeros(self.length, dtype=torch.bool)
        filled = 0
        while filled < self.length and (self.pack or not filled):
            rest = self._unread()
            if rest is None:
                break
            part = rest[: self.length - filled]
            tokens[filled : filled + len(part)] = part
            real[filled : filled + len(part)] = True
            filled += len(part)
            ids[filled:] += 1
            self._advance(len(rest) if not self.pack else len(part))
        if not filled:
            return None
        return (tokens, real, ids) if self.boundaries else (tokens, real)

    def _unread(self) -> Tensor | None:
        """What is left of the present document; the next one where nothing is."""
        empty = 0
        while self._rest is None:
            if self.epochs is not None and self.epoch >= self.epochs:
                return None
            if self._open is None:
                self._open = self.documents.read(self.epoch, self.document)
            ids = next(self._open, None)
            if ids is None:
                if self.document == 0:
                    raise ValueError(
                        f"pass {self.epoch + 1} over the documents gave none: was a generator already exhausted?"
                    )
                self.epoch, self.document, self.offset, self._open = self.epoch + 1, 0, 0, None
                empty += 1
                if empty > 1:
                    raise ValueError("all documents are empty")
                continue
            if self.separator is not None:
                ids = torch.cat([torch.tensor([self.separator]), ids])
            if len(ids) == 0:
                self.document += 1
                continue
            self._rest = ids[self.offset :]
        return self._rest

    def _advance(self, n: int) -> None:
        assert self._rest is not None
        self._rest = self._rest[n:]
        self.offset += n
        if len(self._rest) == 0:
            self.document, self.offset, self._rest = self.document + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "document": self.document, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.document, self.offset = state["epoch"], state["document"], state["offset"]
        self._open = self._rest = None

    def digest(self) -> str:
        apart = " apart" if self.boundaries else ""
        return f"{self.documents.digest()} {self.length} {self.pack} {self.separator} {self.epochs}{apart}"


class MixedRows:
    """Rows drawn from several sources by weight; row i's source depends on the seed and i alone.

    Parameters
    ----------
    parts
        (source, weight) pairs; all rows of one length.
    seed
        Of the draws.
    """

    def __init__(self, parts: Sequence[tuple[RowSource, float]], seed: int = 0) -> None:
        lengths = {source.length for source, _ in parts}
        if len(lengths) != 1:
            raise ValueError(f"the sources of a mix must have rows of one length, got {sorted(lengths)}")
        weights = np.array([weight for _, weight in parts], dtype=np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(f"weights must be 0 or more, and one more than 0; got {weights.tolist()}")
        self.sources = [source for source, _ in parts]
        self.bounds = weights.cumsum() / weights.sum()
        self.seed, self.row, self.length = seed, 0, lengths.pop()
        self.endless = all(endless(source) for source, weight in parts if weight > 0)

    def next_row(self) -> Row | None:
        place = np.random.default_rng([self.seed, self.row]).random()
        row = self.sources[int(np.searchsorted(self.bounds, place, side="right"))].next_row()
        if row is not None:
            self.row += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = state["row"]
        for source, mine in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(mine)

    def digest(self) -> str:
        parts = [source.digest() for source in self.sources]
        return f"mix {self.seed} {self.bounds.tolist()} of " + ", ".join(parts)


class EveryNth:
    """Rows rank, rank + world, rank + 2 world, ...: one process's part of a source that all processes read.

    It ends for all processes at once: the last rows count only if there is one for each.
    """

    def __init__(self, source: RowSource, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        self.source, self.rank, self.world, self.length = source, rank, world, source.length
        self.endless = endless(source)

    def next_row(self) -> Row | None:
        rows = [self.source.next_row() for _ in range(self.world)]
        return None if any(row is None for row in rows) else rows[self.rank]

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def digest(self) -> str:
        return f"{self.source.digest()}, rows {self.rank} of {self.world}"
