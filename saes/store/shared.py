"""A store that several processes capture together: each its own shards, then one manifest over all of them.

with torchrun():
    capture_shared(capture, rows, "acts", 100_000_000)

torchrun --nnodes 8 --nproc-per-node 4 my_capture.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hooked_mamba.durable import write_file
from hooked_mamba.model_hash import model_hash
from hooked_mamba.pieces import Pieces
from hooked_mamba.world import World
from saes.store.blocks import joined
from saes.store.capture import Capture
from saes.store.rows import Rows, RowSource, endless, take
from saes.store.shards import FORMAT, MANIFEST, StoreError, dtype_name

PIECES = "pieces.json"
"""The list of shards as the processes made them; the store's own manifest is written from it."""


def capture_shared(
    capture: Capture,
    rows: RowSource,
    folder: str | Path,
    n_tokens: int | None = None,
    *,
    rows_per_shard: int = 1024,
    rows_per_pass: int = 16,
    seed: int = 0,
    world: World | None = None,
    progress: bool = True,
) -> Path:
    """Capture activations as a store that :class:`ShardReader` and trainings read; under torchrun processes share it.

    A stopped capture continues when it is called again, with as many processes as there then are. The shards are the
    same, bit for bit, however many processes there were. All must see the folder: a shared file system.

    Parameters
    ----------
    capture
        What to read of the model.
    rows
        Its text, which every process goes through, and of which it runs its own part.
    folder
        Of the store.
    n_tokens
        Positions wanted, at least; None: to the end of the text.
    rows_per_shard, rows_per_pass
        Rows of a shard, and of one forward pass.
    seed
        Of the positions kept, where not all are.
    world
        The processes; None: those of torchrun's process group, or this one alone.
    progress
        Whether the first process shows a bar.

    Raises
    ------
    PiecesError
        The folder holds the shards of another capture.
    StoreError
        The folder holds a store that was not captured together, or the text gave nothing.
    """
    folder = Path(folder)
    if n_tokens is None and endless(rows):
        raise ValueError("this source of rows never ends: give the number of positions to capture, n_tokens=")
    about = {
        "streams": capture.widths,
        "dtype": dtype_name(capture.dtype),
        "model": capture.model.cfg.model_name,
        "model_hash": model_hash(capture.model),
        "context_length": rows.length,
        "positions_per_row": capture.positions_per_row,
        "channels": capture.channels,
        "exclude_tokens": list(capture.exclude_tokens),
        "source": f"together {rows_per_shard} {rows_per_pass} {seed} on {rows.digest()}",
    }
    if (folder / MANIFEST).exists() and not (folder / PIECES).exists():
        raise StoreError(f"{folder} holds a store that was captured by one process alone: choose another folder")

    def generator(piece: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1_000_003 + piece)

    def groups() -> Iterator[Rows]:
        piece = found = 0
        while n_tokens is None or found < n_tokens:
            group = take(rows, rows_per_shard)
            if group is None:
                return
            yield group
            drawn = generator(piece)
            found += sum(int(capture.positions(some, drawn)[1].sum()) for some in group.split(rows_per_pass))
            piece += 1

    def one(piece: int, group: Rows) -> dict[str, Tensor]:
        drawn = generator(piece)
        return joined([capture(some, drawn) for some in group.split(rows_per_pass)])

    total = None if n_tokens is None else -(-n_tokens // (rows_per_shard * (capture.positions_per_row or rows.length)))
    pieces = Pieces(folder, about | {"n_tokens": n_tokens}, world=world, name="shard", manifest=PIECES)
    pieces.run(groups(), one, total=total, progress=progress, description="capture")
    if pieces.world.first:
        entries = [
            {"file": e["file"], "tokens": e["rows"], "bytes": e["bytes"], "sha256": e["sha256"]}
            for e in pieces.entries()
        ]
        if not entries:
            raise StoreError("the text gave no position to capture")
        tokens = sum(entry["tokens"] for entry in entries)
        manifest = {"format": FORMAT, **about, "tokens": tokens, "cursor": None, "shards": entries}
        write_file(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    pieces.world.wait()
    return folder
