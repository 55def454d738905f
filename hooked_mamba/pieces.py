"""Work in numbered pieces: shared among processes, stopped and resumed, merged in order.

    folder/work.json                 what the work is; another one is refused
    folder/piece-00012.safetensors   name -> tensor: the results of one piece
    folder/piece-00012.json          its size and checksum; written last, so that a piece with one is whole
    folder/manifest.json             all pieces, once the last one is done

Process r of n does pieces r, r + n, r + 2n, ... that are not done yet. A piece's results do not depend on who computes
it, and results are read in the order of the pieces: they are those of one process, however many there were, and however
often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.durable import write_file
from hooked_mamba.world import World

FORMAT = "hooked-mamba pieces 1"
WORK, MANIFEST = "work.json", "manifest.json"

X = TypeVar("X")


class PiecesError(ValueError):
    """A folder whose pieces are incomplete, damaged, or of other work."""


class Pieces:
    """The pieces of one work in a folder.

    Parameters
    ----------
    folder
        Made if need be.
    about
        What the results depend on: plain values, such as the model's hash and the options. A folder that holds pieces
        of anything else is refused.
    world
        The processes that share the work; None: those of torchrun's process group, or this one alone.
    name, manifest
        Of the files.

    Raises
    ------
    PiecesError
        The folder holds other work.
    """

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, Any],
        *,
        world: World | None = None,
        name: str = "piece",
        manifest: str = MANIFEST,
    ) -> None:
        self.folder, self.name, self.world = Path(folder), name, world or World.current()
        self.manifest = self.folder / manifest
        self.about: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **about}))  # as it will be read
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.world.first and not (self.folder / WORK).exists():
            write_file(self.folder / WORK, _json(self.about))
        self.world.wait()
        found = _read_json(self.folder / WORK)
        for key in {*self.about, *found}:
            if found.get(key) != self.about.get(key):
                raise PiecesError(
                    f"{self.folder} holds pieces of other work: its {key} is {_short(found.get(key))}, this one's"
                    f" {_short(self.about.get(key))}. Choose another folder, or remove that one"
                )

    @classmethod
    def opened(cls, folder: str | Path) -> Pieces:
        """The pieces that a folder holds, whatever they are of.

        Raises
        ------
        PiecesError
            It holds none.
        """
        found = _read_json(Path(folder) / WORK)
        return cls(folder, found, world=World())

    @property
    def complete(self) -> bool:
        """Whether every piece is done and listed in the manifest."""
        return self.manifest.exists()

    def done(self, piece: int) -> bool:
        """Whether a piece is there as a whole."""
        return self._entry_file(piece).exists()

    def mine(self, piece: int) -> bool:
        """Whether this process is to do a piece: it falls to it, and is not done."""
        return piece % self.world.size == self.world.rank and not self.done(piece)

    def run(
        self,
        parts: Iterable[X],
        work: Callable[[int, X], Mapping[str, Tensor]],
        *,
        total: int | None = None,
        progress: bool = True,
        description: str = "pieces",
    ) -> Pieces:
        """Do the pieces that are this process's and not done; returns when all processes are done.

        Parameters
        ----------
        parts
            What each piece works on, in the same order in every process and every run.
        work
            From the piece's number and its part to its results.
        total
            How many parts there are, for the progress bar.
        progress
            Whether the first process shows one.
        """
        if self.complete:
            return self
        count = 0
        with tqdm(total=total, desc=description, unit="piece", disable=not (progress and self.world.first)) as bar:
            for piece, part in enumerate(parts):
                if self.mine(piece):
                    self._write(piece, work(piece, part))
                count += 1
                bar.update()
        self.world.wait()
        if self.world.first:
            entries = [self._entry(piece) for piece in range(count)]
            write_file(self.manifest, _json({**self.about, "pieces": entries}))
        self.world.wait()
        return self

    def __len__(self) -> int:
        return len(self.entries())

    def entries(self) -> list[dict[str, Any]]:
        """File, bytes and checksum of every piece.

        Raises
        ------
        PiecesError
            The work is not complete.
        """
        if not self.complete:
            raise PiecesError(f"{self.folder} is not complete: run the same again, and it continues")
        return list(_read_json(self.manifest)["pieces"])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The results of every piece, in order, each checked."""
        for entry in self.entries():
            yield read_piece(self.folder, entry)

    def _write(self, piece: int, results: Mapping[str, Tensor]) -> None:
        # Own memory for each: safetensors refuses tensors that share it.
        data = save({name: value.detach().cpu().clone().contiguous() for name, value in results.items()})
        file = f"{self.name}-{piece:05d}.safetensors"
        write_file(self.folder / file, data)
        rows = {len(value) for value in results.values() if value.ndim}
        entry = {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_file(self._entry_file(piece), _json(entry | ({"rows": rows.pop()} if len(rows) == 1 else {})))

    def _entry_file(self, piece: int) -> Path:
        return self.folder / f"{self.name}-{piece:05d}.json"

    def _entry(self, piece: int) -> dict[str, Any]:
        if not self.done(piece):
            raise PiecesError(f"{self.folder} has no piece {piece}: was a file removed? Run the same again")
        return _read_json(self._entry_file(piece))


def read_piece(folder: str | Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one piece, its checksum compared.

    Raises
    ------
    PiecesError
        The file is missing or damaged.
    """
    file = str(entry["file"])
    if Path(file).name != file:
        raise PiecesError(f"{folder} lists {file!r:.80}, which is not a file of the folder itself")
    path = Path(folder) / file
    if not path.is_file():
        raise PiecesError(f"{path} is missing: the copy is not whole")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise PiecesError(
            f"{path} is damaged: its checksum is not the manifest's. Remove it and its .json, and run again"
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise PiecesError(f"{path} is not a safetensors file: {error}") from None


def save_tensors(folder: str | Path, tensors: Mapping[str, Tensor], rows: int = 1024) -> Path:
    """Write tensors as sharded safetensors with a manifest, `rows` rows a shard: prompts for many processes.

    Parameters
    ----------
    tensors
        Name -> n ..., all with the same n.

    Raises
    ------
    ValueError
        Nothing to write, or tensors with different numbers of rows.
    """
    sizes = {name: len(value) for name, value in tensors.items()}
    if len(set(sizes.values())) != 1 or rows < 1:
        raise ValueError(f"expected tensors with one number of rows, and rows of 1 or more; got {sizes}, rows={rows}")
    n = next(iter(sizes.values()))
    shapes = {name: [str(value.dtype), list(value.shape)] for name, value in tensors.items()}
    pieces = Pieces(folder, {"tensors": shapes, "rows": rows}, world=World())
    starts = range(0, n, rows)
    pieces.run(starts, lambda _, start: {k: v[start : start + rows] for k, v in tensors.items()}, progress=False)
    return pieces.folder


def load_tensors(folder: str | Path) -> dict[str, Tensor]:
    """What :func:`save_tensors` wrote, or the results of any complete work whose pieces are rows, joined in order.

    Raises
    ------
    PiecesError
        There is no manifest, or a piece is missing or damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise PiecesError(f"{folder} has no {MANIFEST}: nothing was saved there, or the work is not complete")
    parts = [read_piece(folder, entry) for entry in _read_json(path)["pieces"]]
    return joined(parts)


def digest(tensor: Tensor) -> str:
    """16 hex digits that tell one tensor from others: of its type, shape and numbers."""
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, by what follows."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Pieces whose tensors are rows, one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PiecesError(f"{path} is missing") from None
    except ValueError as error:
        raise PiecesError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise PiecesError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
