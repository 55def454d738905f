"""Where each of our weights stands in a file: whole, as rows of a fused tensor, or as a stack of single experts.

A family's table maps our name to a source, or to several in the order in which they are tried. One table serves both
ways: reading takes the first source whose tensors are there, writing takes the first of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from hooked_mamba.loading.shapes import only_shapes
from hooked_mamba.loading.tables import CheckpointError, LazyState, Place


class Piece(NamedTuple):
    """A part of one of our weights, as it stands in a file."""

    name: str
    """Their tensor."""
    axis: int
    start: int
    """Its first row there."""
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Source(ABC):
    """A place in a file."""

    name: str
    """A tensor's name; of a stack with `{e}` for the expert."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors it reads."""
        return (self.name,)

    @abstractmethod
    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Our weight."""

    @abstractmethod
    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        """Our weight in pieces, for writing."""


@dataclass(frozen=True)
class Whole(Source):
    """The tensor as it is."""

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[self.name]

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, ours)]


@dataclass(frozen=True)
class Rows(Source):
    """Some rows (of axis 0, or of each expert's axis 1) of a tensor that holds several weights."""

    start: int
    stop: int
    axis: int = 0

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        tensor = state[self.name]
        return tensor.narrow(self.axis, self.start, self.stop - self.start)

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, self.axis, self.start, ours)]


@dataclass(frozen=True)
class Reshaped(Source):
    """The same numbers in another shape."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        if state[self.name].shape != self.theirs:
            raise CheckpointError(
                f"{LazyState.of(state).place(self.name)} got {tuple(state[self.name].shape)}, expected {self.theirs}"
            )
        return state[self.name].reshape(self.ours)

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: ours().reshape(self.theirs))]


@dataclass(frozen=True)
class Interleaved(Source):
    """Rows in turns: every `count`-th is one of several weights, which stand one behind the other here."""

    count: int

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[self.name][i :: self.count] for i in range(self.count)])

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: torch.stack(ours().chunk(self.count), 1).flatten(0, 1))]


@dataclass(frozen=True)
class Stacked(Source):
    """One tensor for each expert, in order."""

    count: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.name.format(e=e) for e in range(self.count))

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        tensors = [state[name] for name in self.names]
        usual = max((t.shape for t in tensors), key=[t.shape for t in tensors].count)
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor.shape != usual:
                raise CheckpointError(
                    f"{LazyState.of(state).place(name)} got {tuple(tensor.shape)}, expected {tuple(usual)} as of the"
                    " other experts"
                )
        return torch.stack(tensors)

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(name, 0, 0, _expert(ours, e)) for e, name in enumerate(self.names)]


@dataclass(frozen=True)
class Runs(Source):
    """Several runs of rows of one tensor, one behind the other."""

    runs: tuple[tuple[int, int], ...]
    """(first row, row after the last) of each."""

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        tensor = state[self.name]
        return torch.cat([tensor[start:stop] for start, stop in self.runs])

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        found, at = [], 0
        for start, stop in self.runs:
            found.append(Piece(self.name, 0, start, _rows(ours, at, at + stop - start)))
            at += stop - start
        return found


@dataclass(frozen=True)
class Joined(Source):
    """Several tensors, the rows of one behind those of the other; `name` has "{part}" for what tells them apart."""

    sizes: tuple[tuple[str, int], ...]
    """(part, its rows)."""
    cut_anywhere: bool = False
    """Whether files may be cut at other rows, so that only the rows of all parts together count."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.name.format(part=part) for part, _ in self.sizes)

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        tensors = [state[name] for name in self.names]
        if self.cut_anywhere and sum(map(len, tensors)) == sum(size for _, size in self.sizes):
            return torch.cat(tensors)
        for name, tensor, (_, size) in zip(self.names, tensors, self.sizes, strict=True):
            if tensor.ndim != tensors[0].ndim or len(tensor) != size:
                raise CheckpointError(
                    f"{LazyState.of(state).place(name)} got {tuple(tensor.shape)}, expected {size} rows"
                )
        return torch.cat(tensors)

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        found, at = [], 0
        for name, (_, size) in zip(self.names, self.sizes, strict=True):
            found.append(Piece(name, 0, 0, _rows(ours, at, at + size)))
            at += size
        return found


@dataclass(frozen=True)
class OnePlus(Source):
    """A norm's weight w that the family reads as 1 + w: ours is the sum, float32 at least."""

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        weight = state[self.name]
        return 1 + (weight if weight.dtype == torch.float64 else weight.float())

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: ours() - 1)]


Table = Mapping[str, Source | tuple[Source, ...]]
"""Our name -> where it stands, or the places to try in order."""


def read_table(state: Mapping[str, Tensor], table: Table, dropped: tuple[str, ...] = ()) -> LazyState:
    """Weights of a file under our names, each read when it is asked for.

    Parameters
    ----------
    state
        The file's tensors.
    table
        Our name -> sources.
    dropped
        Beginnings of names that are left out without a word.

    Returns
    -------
    LazyState
        What has no place here keeps its name, and what is missing is missing: both are reported, by the file's names,
        together with wrong shapes when the weights are assigned.
    """
    given = LazyState.of(state)
    getters: dict[str, Callable[[], Tensor]] = {}
    places: dict[str, Place] = {}
    expected: dict[str, str] = {}
    used: dict[str, list[Source]] = {}
    for ours, sources in table.items():
        options = sources if isinstance(sources, tuple) else (sources,)
        found = next((s for s in options if all(name in given for name in s.names)), None)
        if found is None:
            # Of several places the one of which most is there: what the file has of it is not unexpected.
            meant = max(options, key=lambda s: sum(name in given for name in s.names))
            absent = [name for name in meant.names if name not in given]
            alternatives = (
                f" (or {', or '.join(s.name for s in options if s is not meant)})" if len(options) > 1 else ""
            )
            expected[ours] = some_of(absent) + alternatives
            used |= {name: [] for name in meant.names if name not in used}
            continue
        for name in found.names:
            used.setdefault(name, []).append(found)
        places[ours] = given.place(found.names[0])._replace(
            tensor=some_of([given.place(name).tensor for name in found.names]),
            changed=not isinstance(found, Whole),
            rows=tuple(str(given.place(name)) for name in found.names) if isinstance(found, Stacked) else (),
        )
        getters[ours] = _reader(found, given, used)
    for name in given:
        if name not in used and not name.startswith(dropped):
            key = f"{name} (unexpected)" if name in table else name
            getters[key], places[key] = given.getter(name), given.place(name)
    return LazyState(getters, places, expected)


def some_of(names: Sequence[str]) -> str:
    """The first of several tensors that make one weight, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def write_table(state: Mapping[str, Tensor], table: Table, names: Collection[str] | None = None) -> LazyState:
    """The inverse of :func:`read_table`, under the first source's names; with `names`, under the first that are there.

    Raises
    ------
    CheckpointError
        Listing the weights that have no place in this format.
    """
    unknown = [name for name in state if name not in table]
    if unknown:
        raise CheckpointError(f"no name in this format for {', '.join(unknown)}")
    pieces: dict[str, list[Piece]] = {}
    lazy = LazyState.of(state)
    for ours in state:
        options = table[ours]
        sources = options if isinstance(options, tuple) else (options,)
        there = (s for s in sources if names is None or all(name in names for name in s.names))
        first = next(there, sources[0])
        for piece in first.parts(lazy.getter(ours)):
            pieces.setdefault(piece.name, []).append(piece)
    return LazyState({name: _joined(sorted(parts, key=lambda part: part.start)) for name, parts in pieces.items()})


def _reader(source: Source, state: LazyState, used: Mapping[str, Sequence[Source]]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if isinstance(source, Rows | Runs):
            _covered(source, state, used[source.name])
        return source.read(state)

    return read


def _covered(source: Rows | Runs, state: LazyState, readers: Sequence[Source]) -> None:
    """Refuse a tensor of several weights that has more or fewer rows than they take."""
    axis = source.axis if isinstance(source, Rows) else 0
    wanted = max(max(stop for _, stop in s.runs) if isinstance(s, Runs) else s.stop for s in readers if _in_rows(s))
    with only_shapes():
        shape = tuple(state[source.name].shape)
    if len(shape) <= axis or shape[axis] != wanted:
        raise CheckpointError(f"{state.place(source.name)} got {shape}, expected {wanted} rows on axis {axis}")


def _in_rows(source: Source) -> TypeGuard[Rows | Runs]:
    return isinstance(source, Rows | Runs)


def _expert(ours: Callable[[], Tensor], e: int) -> Callable[[], Tensor]:
    return lambda: ours()[e]


def _rows(ours: Callable[[], Tensor], start: int, stop: int) -> Callable[[], Tensor]:
    return lambda: ours()[start:stop]


def _joined(parts: list[Piece]) -> Callable[[], Tensor]:
    if len(parts) == 1:
        return parts[0].make
    return lambda: torch.cat([part.make() for part in parts], parts[0].axis)
