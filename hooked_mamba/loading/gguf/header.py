"""The beginning of a GGUF file: what it says about the model, and where each tensor lies.

The format is that of llama.cpp, versions 2 and 3, little-endian: magic, counts, keys with typed values, then for each
tensor its name, axes, type and offset, and behind an aligned end of all that the numbers. Axes stand in the order of
ggml, the fastest first; they are turned here into that of PyTorch. Nothing in the file is trusted: every count and
length is held against what is left of it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hooked_mamba.loading.tables import CheckpointError

__all__ = ["Header", "TensorEntry", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NAME_BYTES_MAX = 65535
HEADER_BYTES_MAX = 2**30
AXES_MAX = 4
ALIGNMENT = 32
"""Of the numbers, where `general.alignment` says nothing else."""

SCALARS = {
    0: ("<u1", "u8"),
    1: ("<i1", "i8"),
    2: ("<u2", "u16"),
    3: ("<i2", "i16"),
    4: ("<u4", "u32"),
    5: ("<i4", "i32"),
    6: ("<f4", "f32"),
    10: ("<u8", "u64"),
    11: ("<i8", "i64"),
    12: ("<f8", "f64"),
}
"""Number of a value's type -> numpy's dtype, its name."""
BOOL, STRING, ARRAY = 7, 8, 9

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header lists it."""

    name: str
    shape: Shape
    """In PyTorch's order."""
    type: int
    """Number of its ggml type."""
    offset: int
    """First byte, from the beginning of the file."""


@dataclass(frozen=True)
class Header:
    """Everything before the numbers."""

    path: Path
    keys: dict[str, Any]
    """Values by key; arrays as lists of strings or numpy arrays."""
    tensors: dict[str, TensorEntry]
    size: int
    """Bytes of the whole file."""


class _Cursor:
    """A place in the header's bytes that refuses to run past the end."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def take(self, count: int, what: str) -> int:
        """The place of the next `count` bytes; moves behind them."""
        start = self.at
        if count < 0 or start + count > len(self.data):
            raise self.fault(
                f"{what} ends at byte {start + count:,} of {self.size:,}: the file is truncated or damaged"
            )
        self.at = start + count
        return start

    def number(self, code: str, what: str) -> int:
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str, most: int = HEADER_BYTES_MAX) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > most:
            raise self.fault(f"{what} is {length:,} bytes long; expected at most {most:,}")
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} at byte {start:,} is no UTF-8") from None

    def value(self, kind: int, what: str, nested: bool = False) -> Any:
        if kind in SCALARS:
            code, _ = SCALARS[kind]
            dtype = np.dtype(code)
            return np.frombuffer(self.data, dtype, 1, self.take(dtype.itemsize, what))[0].item()
        if kind == BOOL:
            given = self.number("<B", what)
            if given > 1:
                raise self.fault(f"{what} is {given}; expected a boolean, 0 or 1")
            return bool(given)
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY and not nested:
            return self._array(what)
        raise self.fault(f"{what} is of type {kind}, which the format does not know{' inside an array' * nested}")

    def _array(self, what: str) -> Any:
        kind, count = self.number("<I", what), self.number("<Q", what)
        itemsize = np.dtype(SCALARS[kind][0]).itemsize if kind in SCALARS else {BOOL: 1, STRING: 8}.get(kind, 1)
        if count * itemsize > len(self.data) - self.at:
            raise self.fault(f"{what} says that it has {count:,} entries, more than the file has bytes for")
        if kind in SCALARS or kind == BOOL:
            dtype = np.dtype(SCALARS.get(kind, ("<u1",))[0])
            return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize, what))
        if kind == STRING:
            return self._strings(count, what)
        return [self.value(kind, what, nested=True) for _ in range(count)]

    def _strings(self, count: int, what: str) -> list[str]:
        """Vocabularies have 10^5 of them: no function call for each."""
        data, at, end, found = self.data, self.at, len(self.data), []
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8 + length
                if at > end:
                    break
                found.append(data[at - length : at].decode("utf-8"))
        except UnicodeDecodeError:
            raise self.fault(f"entry {len(found)} of {what} is no UTF-8") from None
        except struct.error:
            at = end + 1
        if at > end:
            raise self.fault(f"entry {len(found)} of {what} runs past the end: the file is truncated or damaged")
        self.at = at
        return found


def read_header(path: Path) -> Header:
    """Read everything before the numbers.

    Raises
    ------
    CheckpointError
        Not a GGUF file, one of another version or byte order, a truncated or damaged one; file, key or tensor and
        cause are named.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        _check_start(path, start)
        file.seek(0)
        return _parse(path, file, size)


def _check_start(path: Path, start: bytes) -> None:
    if not start:
        raise CheckpointError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    if not start.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a GGUF file (it starts with {start[:4]!r}; expected {MAGIC!r})")
    if len(start) < 24:
        raise CheckpointError(f"{path} is truncated: it has {len(start)} bytes, the counts alone take 24")
    version = int.from_bytes(start[4:8], "little")
    if version not in VERSIONS:
        if int.from_bytes(start[4:8], "big") in VERSIONS:
            raise CheckpointError(f"{path} is big-endian, which is not read here; expected a little-endian GGUF file")
        raise CheckpointError(f"{path} is of GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}")


def _parse(path: Path, file: BinaryIO, size: int) -> Header:
    """The header's length is known only at its end, so it is read in growing pieces."""
    length = min(size, 2**22)
    while True:
        file.seek(0)
        cursor = _Cursor(path, file.read(length), size)
        try:
            return _header(cursor)
        except CheckpointError:
            if length >= min(size, HEADER_BYTES_MAX):
                raise
            length = min(size, HEADER_BYTES_MAX, 8 * length)


def _header(cursor: _Cursor) -> Header:
    cursor.at = 8
    n_tensors, n_keys = cursor.number("<Q", "the number of tensors"), cursor.number("<Q", "the number of keys")
    for count, what, least in ((n_keys, "keys", 13), (n_tensors, "tensors", 32)):
        if count * least > cursor.size:
            raise cursor.fault(f"the header says that there are {count:,} {what}, more than the file has bytes for")
    keys: dict[str, Any] = {}
    for i in range(n_keys):
        name = cursor.text(f"the name of key {i}", NAME_BYTES_MAX)
        if name in keys:
            raise cursor.fault(f"the key {name!r} is there twice")
        keys[name] = cursor.value(cursor.number("<I", f"the type of {name}"), f"the key {name}")
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise cursor.fault(f"the key general.alignment is {alignment!r}; expected a multiple of 8")
    rows = [_tensor(cursor, i) for i in range(n_tensors)]
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorEntry] = {}
    for row in rows:
        if row.name in tensors:
            raise cursor.fault(f"the tensor {row.name} is there twice")
        if row.offset % alignment:
            raise cursor.fault(f"the tensor {row.name} begins at {row.offset:,}; expected a multiple of {alignment}")
        tensors[row.name] = TensorEntry(row.name, row.shape, row.type, base + row.offset)
    return Header(cursor.path, keys, tensors, cursor.size)


def _tensor(cursor: _Cursor, i: int) -> TensorEntry:
    name = cursor.text(f"the name of tensor {i}", NAME_BYTES_MAX)
    what = f"the tensor {name}"
    axes = cursor.number("<I", what)
    if not 1 <= axes <= AXES_MAX:
        raise cursor.fault(f"{what} has {axes} axes; expected 1 to {AXES_MAX}")
    shape = tuple(cursor.number("<Q", what) for _ in range(axes))[::-1]
    if min(shape) < 1 or math.prod(shape) > 2**48:
        raise cursor.fault(f"{what} has the shape {shape}, which no tensor has")
    return TensorEntry(name, shape, cursor.number("<I", what), cursor.number("<Q", what))
