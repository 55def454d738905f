"""What llama.cpp's converter does to weights, undone: places in a GGUF file beside those of every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_mamba.loading.sources import Piece, Source
from hooked_mamba.loading.tables import CheckpointError, LazyState

__all__ = ["Decay", "Shaped", "Slice", "TiledHeads", "Turned", "Unpaired"]


@dataclass(frozen=True)
class Shaped(Source):
    """The same numbers; an axis of length one more or less, or one axis cut in two."""

    ours: tuple[int, ...]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return _shaped(state, self.name, self.ours)

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: ours().squeeze())]


@dataclass(frozen=True)
class Decay(Source):
    """A = -exp(A_log), of which ours is A_log; in float64, so that -exp of it is A again."""

    ours: tuple[int, ...]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        A = _shaped(state, self.name, self.ours)
        if A.device.type != "meta" and bool((A >= 0).any()):
            raise CheckpointError(
                f"{LazyState.of(state).place(self.name)} has {int((A >= 0).sum())} values that are not negative;"
                " expected -exp(A_log)"
            )
        return (-A.double()).log()

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: -ours().exp())]


@dataclass(frozen=True)
class Slice(Source):
    """One of several vectors in one tensor."""

    row: int
    count: int
    size: int

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return _shaped(state, self.name, (self.count, self.size), any_axes=True)[self.row]

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, self.row, lambda: ours()[None])]


@dataclass(frozen=True)
class Turned(Source):
    """The transposed matrix."""

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[self.name].t()

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: ours().t())]


@dataclass(frozen=True)
class Unpaired(Source):
    """Rows of queries or keys in which the two that turn together stand side by side; ours are half a head apart."""

    heads: int

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        rows = state[self.name]
        _divisible(state, self.name, rows, 0, 2 * self.heads)
        return rows.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        return [Piece(self.name, 0, 0, lambda: ours().unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2))]


@dataclass(frozen=True)
class TiledHeads(Source):
    """Value heads in turns, one of each key head, from `start` on of an axis; ours stand by key head.

    A source over the reordered tensor may follow.
    """

    key_heads: int
    per_key: int
    """Value heads of one key head."""
    start: int = 0
    axis: int = 0
    then: Callable[[str], Source] | None = None
    """The tensor's name -> that source."""

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        tensor = state[self.name]
        if tensor.ndim <= self.axis or tensor.shape[self.axis] <= self.start:
            raise CheckpointError(
                f"{LazyState.of(state).place(self.name)} got {tuple(tensor.shape)}, expected more than {self.start} on"
                f" axis {self.axis}"
            )
        heads = tensor.narrow(self.axis, self.start, tensor.shape[self.axis] - self.start)
        _divisible(state, self.name, heads, self.axis, self.key_heads * self.per_key)
        apart = heads.unflatten(self.axis, (self.per_key, self.key_heads, -1))
        by_key = apart.transpose(self.axis, self.axis + 1).flatten(self.axis, self.axis + 2)
        found = torch.cat([tensor.narrow(self.axis, 0, self.start), by_key], self.axis)
        if self.then is None:
            return found
        place = LazyState.of(state).place(self.name)
        return self.then(self.name).read(LazyState({self.name: lambda: found}, {self.name: place}))

    def parts(self, ours: Callable[[], Tensor]) -> list[Piece]:
        def tiled() -> Tensor:
            tensor = ours()
            heads = tensor.narrow(self.axis, self.start, tensor.shape[self.axis] - self.start)
            apart = heads.unflatten(self.axis, (self.key_heads, self.per_key, -1))
            in_turns = apart.transpose(self.axis, self.axis + 1).flatten(self.axis, self.axis + 2)
            return torch.cat([tensor.narrow(self.axis, 0, self.start), in_turns], self.axis)

        make = tiled
        if self.then is not None:
            make = self.then(self.name).parts(tiled)[0].make
        return [Piece(self.name, 0, 0, make)]


def _shaped(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], any_axes: bool = False) -> Tensor:
    """A tensor in our shape.

    Raises
    ------
    CheckpointError
        It has another number of entries, or other axes that are longer than one.
    """
    tensor = state[name]
    if tensor.shape == shape:
        return tensor
    plain = [n for n in tensor.shape if n != 1], [n for n in shape if n != 1]
    cut = any_axes or len(shape) == 1 or tensor.ndim == 1  # one axis for several: r_k, the norm of each group
    if tensor.numel() != torch.Size(shape).numel() or (plain[0] != plain[1] and not cut):
        raise CheckpointError(f"{LazyState.of(state).place(name)} got {tuple(tensor.shape)}, expected {shape}")
    return tensor.reshape(shape)


def _divisible(state: Mapping[str, Tensor], name: str, tensor: Tensor, axis: int, count: int) -> None:
    if tensor.ndim <= axis or tensor.shape[axis] % count:
        place, shape = LazyState.of(state).place(name), tuple(tensor.shape)
        raise CheckpointError(f"{place} got {shape}, expected a multiple of {count} on axis {axis}")
