"""Where tokens come from: documents out of text files, lists, token tensors or anything that can be iterated."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hooked_mamba.local_paths import near_paths

END = "<|endoftext|>"
"""What separates documents in a text file."""


@runtime_checkable
class Documents(Protocol):
    """Documents of token ids that can be read again from any place."""

    def read(self, epoch: int, start: int) -> Iterator[Tensor]:
        """The documents of one pass from the `start`-th on; the order may depend on the pass."""
        ...

    def digest(self) -> str:
        """A fingerprint, so that a resumed run can tell that it reads the same text."""
        ...


class ListedDocuments:
    """Documents in memory, in a new order in every pass.

    Parameters
    ----------
    items
        Texts, or rows of token ids.
    encode
        Text to token ids; None where the items are ids.
    shuffle, seed
        Whether every pass has another order, and what it is drawn from.
    """

    def __init__(
        self,
        items: Sequence[Any],
        encode: Callable[[str], list[int]] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if len(items) == 0:
            raise ValueError("there are no documents: the list is empty")
        self.items, self.encode, self.shuffle, self.seed = items, encode, shuffle, seed

    def read(self, epoch: int, start: int) -> Iterator[Tensor]:
        order = np.arange(len(self.items))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        for i in order[start:].tolist():
            yield as_ids(self.items[i], self.encode)

    def digest(self) -> str:
        sha = hashlib.sha256()
        for item in self.items:
            sha.update(_as_bytes(item) + b"\0")
        return sha.hexdigest()[:16]


class StreamedDocuments:
    """Documents of an iterable (a `datasets` data set, streamed or not), in its own order.

    Parameters
    ----------
    source
        Yields texts, rows of token ids, or mappings that hold one of these under `column`. Iterated again in every
        pass: a generator that can be read only once gives one pass.
    encode
        Text to token ids; None where the documents are ids.
    column
        Key of the text, or of the token ids, in mappings.
    """

    def __init__(
        self, source: Iterable[Any], encode: Callable[[str], list[int]] | None = None, *, column: str = "text"
    ) -> None:
        self.source, self.encode, self.column = source, encode, column

    def read(self, epoch: int, start: int) -> Iterator[Tensor]:
        skip = getattr(self.source, "skip", None)  # datasets' own, which need not read what it skips
        rest = skip(start) if skip is not None and start else self.source
        for item in islice(rest, 0 if skip is not None else start, None):
            yield as_ids(self._document(item), self.encode)

    def digest(self) -> str:
        """Of the first document only: reading more could be slow."""
        if iter(self.source) is self.source:  # a generator: the document would be lost
            return "read once"
        first = next(iter(self.source), None)
        if first is None:
            raise ValueError("there are no documents: the iterable is empty")
        return hashlib.sha256(_as_bytes(self._document(first))).hexdigest()[:16]

    def _document(self, item: Any) -> Any:
        if not isinstance(item, Mapping):
            return item
        if self.column not in item:
            raise KeyError(f"the documents have no column {self.column!r}; there are {', '.join(map(str, item))}")
        return item[self.column]


def as_ids(item: Any, encode: Callable[[str], list[int]] | None) -> Tensor:
    """One document as token ids."""
    if isinstance(item, str):
        if encode is None:
            raise TypeError("the documents are texts and the model has no tokenizer")
        return torch.tensor(encode(item), dtype=torch.long)
    ids = torch.as_tensor(item)
    if ids.shape == (0,):
        return ids.long()
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise TypeError(f"a document must be text or one row of token ids, got {ids.dtype} {list(ids.shape)}")
    return ids.long()


def read_text_file(path: str | Path, separator: str = END) -> list[str]:
    """The documents of a UTF-8 text file, separated by `separator`.

    Raises
    ------
    ValueError
        If it holds no text.
    FileNotFoundError
        There is no such file, as where the text itself was given.
    """
    try:
        read = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
        shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:60]}... ({len(str(path)):,} characters)"
        near = near_paths(path) if error.errno == errno.ENOENT else ""
        raise FileNotFoundError(
            errno.ENOENT, f"there is no text file {shown!r}{near}; pass the text itself in a list, text=[...]"
        ) from None
    documents = [text.strip() for text in read.split(separator)]
    documents = [text for text in documents if text]
    if not documents:
        raise ValueError(f"{path} holds no text: expected documents separated by {separator!r}")
    return documents


def _as_bytes(item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode()
    return torch.as_tensor(item).long().cpu().numpy().tobytes()
