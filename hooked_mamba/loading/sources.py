"""Where each of our weights stands in a file: whole, as rows of a fused tensor, or as a stack of single experts.

A family's table maps our name to a source, or to several in the order in which they are tried. One table serves both
ways: reading takes the first source whose tensors are there, writing takes the first of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_mamba.loading.tables import CheckpointError, LazyState


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
    def parts(self, ours: Callable[[], Tensor]) -> dict[str, tuple[int, int, Callable[[], Tensor]]]:
        """Their tensor's name -> (axis, first row, the piece) of our weight, for writing."""


@dataclass(frozen=True)
class Whole(Source):
    """The tensor as it is."""

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[self.name]

    def parts(self, ours: Callable[[], Tensor]) -> dict[str, tuple[int, int, Callable[[], Tensor]]]:
        return {self.name: (0, 0, ours)}


@dataclass(frozen=True)
class Rows(Source):
    """Some rows (of axis 0, or of each expert's axis 1) of a tensor that holds several weights."""

    start: int
    stop: int
    axis: int = 0

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        tensor = state[self.name]
        if tensor.shape[self.axis] < self.stop:
            raise CheckpointError(
                f"{self.name} is {list(tensor.shape)}; expected {self.stop} rows or more on axis {self.axis}"
            )
        return tensor.narrow(self.axis, self.start, self.stop - self.start)

    def parts(self, ours: Callable[[], Tensor]) -> dict[str, tuple[int, int, Callable[[], Tensor]]]:
        return {self.name: (self.axis, self.start, ours)}


@dataclass(frozen=True)
class Reshaped(Source):
    """The same numbers in another shape."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        if state[self.name].shape != self.theirs:
            raise CheckpointError(f"{self.name} is {list(state[self.name].shape)}; expected {list(self.theirs)}")
        return state[self.name].reshape(self.ours)

    def parts(self, ours: Callable[[], Tensor]) -> dict[str, tuple[int, int, Callable[[], Tensor]]]:
        return {self.name: (0, 0, lambda: ours().reshape(self.theirs))}


@dataclass(frozen=True)
class Interleaved(Source):
    """Rows in turns: every `count`-th is one of several weights, which stand one behind the other here."""

    count: int

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[self.name][i :: self.count] for i in range(self.count)])

    def parts(self, ours: Callable[[], Tensor]) -> dict[str, tuple[int, int, Callable[[], Tensor]]]:
        return {self.name: (0, 0, lambda: torch.stack(ours().chunk(self.count), 1).flatten(0, 1))}


@dataclass(frozen=True)
class Stacked(Source):
    """One tensor for each expert, in order."""

    count: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.name.format(e=e) for e in range(self.count))

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([state[name] for name in self.names])

    def parts(self, ours: Callable[[], Tensor]) -> dict[str, tuple[int, int, Callable[[], Tensor]]]:
        return {name: (0, 0, _expert(ours, e)) for e, name in enumerate(self.names)}


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

    Raises
    ------
    CheckpointError
        Naming every tensor of the file that is missing, and every one that has no place here.
    """
    getters: dict[str, Callable[[], Tensor]] = {}
    used: set[str] = set()
    faults: list[str] = []
    for ours, sources in table.items():
        options = sources if isinstance(sources, tuple) else (sources,)
        found = next((s for s in options if all(name in state for name in s.names)), None)
        if found is None:
            absent = [name for name in options[0].names if name not in state]
            alternatives = f" (or {', or '.join(s.name for s in options[1:])})" if len(options) > 1 else ""
            faults.append(f"missing: {absent[0]}{alternatives}, for {ours}")
            continue
        used.update(found.names)
        getters[ours] = _reader(found, state)
    faults += [
        f"unexpected: {name} {tuple(state[name].shape)}"
        for name in state
        if name not in used and not name.startswith(dropped)
    ]
    if faults:
        raise CheckpointError(f"the tensors do not fit the config, {len(faults)} faults:\n  " + "\n  ".join(faults))
    return LazyState(getters)


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
    pieces: dict[str, list[tuple[int, int, Callable[[], Tensor]]]] = {}
    lazy = LazyState.of(state)
    for ours in state:
        options = table[ours]
        sources = options if isinstance(options, tuple) else (options,)
        there = (s for s in sources if names is None or all(name in names for name in s.names))
        first = next(there, sources[0])
        for name, piece in first.parts(lazy.getter(ours)).items():
            pieces.setdefault(name, []).append(piece)
    return LazyState({name: _joined(sorted(parts, key=lambda part: part[1])) for name, parts in pieces.items()})


def _reader(source: Source, state: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: source.read(state)


def _expert(ours: Callable[[], Tensor], e: int) -> Callable[[], Tensor]:
    return lambda: ours()[e]


def _joined(parts: list[tuple[int, int, Callable[[], Tensor]]]) -> Callable[[], Tensor]:
    if len(parts) == 1:
        return parts[0][2]
    return lambda: torch.cat([make() for _, _, make in parts], parts[0][0])
