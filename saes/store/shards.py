"""Activations on disk: safetensors shards and a manifest that only lists complete ones.

    folder/manifest.json          what was captured, from which model, and every shard's size and checksum
    folder/shard-00000.safetensors  stream -> [n, width]; row i is the same position in every stream

A shard is written aside, brought to the disk and renamed before the manifest names it, so that a crash loses at most
the shard at work. Neither text nor token ids are stored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_mamba.durable import DiskFullError, write_file
from saes.options import unique_keys

FORMAT = "hooked-mamba activations 1"
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StoreError(ValueError):
    """A store on disk that is incomplete, or of something else."""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in the manifest.

    Raises
    ------
    ValueError
        For a dtype that a store cannot have.
    """
    for name, known in DTYPES.items():
        if dtype is known:
            return name
    raise ValueError(f"a store's dtype must be one of {', '.join(DTYPES)}; got {dtype}")


class ShardWriter:
    """Adds shards to a folder.

    Parameters
    ----------
    folder
        Created if needed. If it has a manifest, writing continues after its last shard.
    about
        What the manifest records besides its shards: "streams" (name -> width), "dtype", the model and the text.

    Raises
    ------
    StoreError
        If the folder holds a store of something else.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps({"format": FORMAT, **about}))  # as it will be read
        if (self.folder / MANIFEST).exists():
            self.manifest = read_manifest(self.folder)
            for key, value in about.items():
                if self.manifest.get(key) != value:
                    raise StoreError(
                        f"{self.folder} holds another store: its {key} is {self.manifest.get(key)!r}, this one's"
                        f" {value!r}. Choose another folder, or remove that one"
                    )
        else:
            self.manifest = {**about, "tokens": 0, "cursor": None, "shards": []}
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()

    @property
    def tokens(self) -> int:
        """Positions stored so far."""
        return self.manifest["tokens"]

    def write(self, values: dict[str, Tensor], cursor: dict[str, Any]) -> None:
        """Add a shard; `cursor` is where its text ends.

        Raises
        ------
        DiskFullError
            If there is no room for it; the store is unchanged.
        """
        data = save({name: value.contiguous().cpu() for name, value in values.items()})
        free = shutil.disk_usage(self.folder).free
        if free < len(data) + 2**20:
            raise DiskFullError(
                f"{self.folder} has room for {free:,} bytes and the next shard takes {len(data):,}; the"
                f" {self.tokens:,} positions stored so far are whole. Make room and run the same again"
            )
        n = len(next(iter(values.values())))
        name = f"shard-{len(self.manifest['shards']):05d}.safetensors"
        write_file(self.folder / name, data)
        entry = {"file": name, "tokens": n, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {
            **self.manifest,
            "tokens": self.tokens + n,
            "cursor": cursor,
            "shards": [*self.manifest["shards"], entry],
        }
        write_file(self.folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        self.manifest = manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a store, checked.

    Raises
    ------
    FileNotFoundError
        If there is none.
    StoreError
        If it is no manifest of this format, or names files outside its folder.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no store: there is no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except ValueError as error:
        raise StoreError(f"{path} is no JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise StoreError(f"{path} has the format {got!r}, expected {FORMAT!r}")
    try:
        streams, shards = manifest["streams"], manifest["shards"]
        whole = (
            manifest["dtype"] in DTYPES
            and all(isinstance(name, str) and width > 0 for name, width in streams.items())
            and all(
                Path(s["file"]).name == s["file"] and s["tokens"] > 0 and s["bytes"] > 0 and len(s["sha256"]) == 64
                for s in shards
            )
            and manifest["tokens"] == sum(s["tokens"] for s in shards)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} lacks {error} or has it in another form") from None
    if not whole:
        raise StoreError(f"{path} contradicts itself: its counts, names or dtype cannot be right")
    return manifest


class ShardReader:
    """Reads the shards of a store; every one is checked against the manifest.

    Parameters
    ----------
    folder
        Of the store.
    streams
        Which to read; default: all.

    Raises
    ------
    StoreError
        If a shard is missing or torn, or a stream is not there.
    """

    def __init__(self, folder: str | Path, streams: list[str] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        there = self.manifest["streams"]
        for name in streams or ():
            if name not in there:
                raise StoreError(f"{folder} holds no stream {name!r}; it holds {', '.join(there)}")
        self.widths: dict[str, int] = {name: there[name] for name in (streams or there)}
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        if not self.shards:
            raise StoreError(f"{folder} holds no shard yet")
        for shard in self.shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise StoreError(
                    f"{path} {found}, the manifest says {shard['bytes']:,}: the copy is not whole. Fetch it again, or"
                    " capture the store again"
                )

    def read(self, i: int) -> dict[str, Tensor]:
        """Stream -> [n, width] of shard i."""
        shard = self.shards[i]
        path = self.folder / shard["file"]
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise StoreError(f"{path} is damaged: its checksum is not the manifest's. Capture the store again")
        try:
            values = load(data)
        except SafetensorError as error:
            raise StoreError(f"{path} is no safetensors file: {error}") from None
        for name, width in self.widths.items():
            value = values.get(name)
            if value is None or value.shape != (shard["tokens"], width) or value.dtype != self.dtype:
                got = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
                raise StoreError(f"{path} has {got} as {name}, expected {self.dtype} {[shard['tokens'], width]}")
        return {name: values[name] for name in self.widths}
