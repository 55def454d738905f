"""Reading weight files without trusting them: safetensors, or PyTorch archives with no code in them.

Tensors are views of the memory-mapped file. A mapping stays in memory as far as it was read, so the file is
mapped again after every `REMAP_BYTES`: whoever copies tensor by tensor holds one copy and little more.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hooked_mamba.loading.tables import CheckpointError, LazyState, Place, some

__all__ = ["open_bin", "open_safetensors", "open_sharded", "read_json"]

REMAP_BYTES = 64 * 2**20
JSON_BYTES_MAX = 64 * 2**20
HEADER_BYTES_MAX = 100 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    transformers 5 writes an infinity as `{"__float__": "Infinity"}`, earlier releases as the bare word.

    Raises
    ------
    CheckpointError
        No file, no JSON, no object, or larger than any config is.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    if path.stat().st_size > JSON_BYTES_MAX:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than a config can have")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_floats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def _floats(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if list(value) == ["__float__"] else value


def _check_file(path: Path) -> bytes:
    """The first bytes of a weight file that is there, not empty and not a stand-in for itself."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    return start


def _check_safetensors(path: Path) -> None:
    """Say what is wrong with a file that is no safetensors file, or only the start of one."""
    start = _check_file(path)
    size = path.stat().st_size
    header_bytes = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not 2 <= header_bytes <= HEADER_BYTES_MAX or start[8:9] != b"{":
        raise CheckpointError(f"{path} is not a safetensors file (it starts with {start[:8]!r})")
    if 8 + header_bytes > size:
        raise CheckpointError(
            f"{path} is truncated: its header alone takes {8 + header_bytes:,} bytes, it has {size:,}"
        )
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_bytes + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: its header does not read ({error})") from None
    if expected != size:
        state = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path} is {state}: expected {expected:,} bytes, it has {size:,}")


class _Remapping:
    """Tensors of one file by name; maps it again after `REMAP_BYTES` so that pages already read are let go."""

    def __init__(self, file: str, open_file: Callable[[], tuple[Callable[[str], Tensor], list[str]]]) -> None:
        self._file, self._open = file, open_file
        self._get, self.names = open_file()
        self._bytes_read = 0

    def get(self, name: str) -> Tensor:
        if self._bytes_read > REMAP_BYTES:
            self._get, _ = self._open()
            self._bytes_read = 0
        tensor = self._get(name)
        self._bytes_read += tensor.nbytes
        return tensor

    def state(self) -> LazyState:
        def getter(name: str) -> Callable[[], Tensor]:
            return lambda: self.get(name)

        places = {name: Place(name, self._file) for name in self.names}
        return LazyState({name: getter(name) for name in self.names}, places)


def open_safetensors(path: Path) -> LazyState:
    """The tensors of a safetensors file.

    Raises
    ------
    CheckpointError
        No file, another kind of file, or a truncated one.
    """
    _check_safetensors(path)

    def open_file() -> tuple[Callable[[str], Tensor], list[str]]:
        try:
            handle = safe_open(str(path), framework="pt", device="cpu")
        except Exception as error:  # the library's own errors share no base class with those of the system
            raise CheckpointError(f"{path} does not read as safetensors: {error}") from None
        return handle.get_tensor, list(handle.keys())

    return _Remapping(path.name, open_file).state()


def open_bin(path: Path) -> LazyState:
    """The tensors of a PyTorch archive (`pytorch_model.bin`), read without running what may be in it.

    Raises
    ------
    CheckpointError
        No file, a damaged one, or one that holds anything but tensors by name.
    """
    archive = _check_file(path).startswith(b"PK")  # older files are one pickle stream and cannot be mapped

    def open_file() -> tuple[Callable[[str], Tensor], list[str]]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        except Exception as error:  # a damaged or hostile file can fail in any way
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path} does not read as plain weights: it is damaged, or holds code, which is never run "
                f"({type(error).__name__}: {reason[0] if reason else 'no message'})"
            ) from None
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{path} holds a {type(state).__name__}; expected tensors by name")
        strange = [
            str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)
        ]
        if strange:
            raise CheckpointError(f"{path} holds entries that are no tensors: {some(strange)}")
        return state.__getitem__, list(state)

    return _Remapping(path.name, open_file).state()


def open_sharded(index: Path, open_shard: Callable[[Path], LazyState], suffix: str) -> LazyState:
    """The tensors of several files, by an index that names for each tensor its file.

    Raises
    ------
    CheckpointError
        A shard outside the folder or of another kind, missing shards, or shards that hold other tensors than
        the index says.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no `weight_map` from tensor names to file names")
    files = sorted(set(weight_map.values()))
    for name in files:
        plain = PurePosixPath(name).name == name and PureWindowsPath(name).name == name and name not in ("", ".", "..")
        if not plain or not name.endswith(suffix):
            raise CheckpointError(f"{index} names the shard {name!r}; expected a {suffix} file in the same folder")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {len(files)} shards, of which these are not there: {some(missing)}")
    tensors: dict[str, Callable[[], Tensor]] = {}
    places: dict[str, Place] = {}
    for name in files:
        shard = open_shard(index.parent / name)
        promised = {tensor for tensor, file in weight_map.items() if file == name}
        if promised != set(shard):
            raise CheckpointError(
                f"{name} does not hold what {index.name} says: "
                f"missing {some(promised - set(shard)) or 'nothing'}; "
                f"unexpected {some(set(shard) - promised) or 'nothing'}"
            )
        tensors |= {tensor: shard.getter(tensor) for tensor in shard}
        places |= {tensor: shard.place(tensor) for tensor in shard}
    return LazyState(tensors, places)
