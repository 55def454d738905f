"""A module's description of its hook sites, one row each, for everything that needs to know."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["point", "lazy", "state"]
"""point: on the path of every call. lazy: computed only while something sits on it. state: lazy, and the state
after each single position is a site of its own, `hook_h.{t}`."""

AXES = {"E": "channel", "H": "head", "Q": "head", "J": "key_value_head", "N": "state", "F": "neuron", "X": "expert"}
"""What an axis of a shape is called where a sweep runs over it."""


@dataclass(frozen=True)
class Site:
    """One hook site, declared by its module."""

    name: str
    """Name of the hook point in its module."""
    shape: str
    """Axes by symbols, such as "b l E N"; sums and multiples as "R+2N". The module's `sizes` give the numbers."""
    text: str
    """What stands there, for tables and errors."""
    kind: Kind = "point"
    wide: bool = False
    """Whether it is float32 (or float64) also in a half-precision model."""
    default: bool | None = None
    """Whether a cache without a filter holds it. None: every site on the path of a call, no lazy one."""
    single: str = ""
    """Of a state: what `{name}.{t}` is."""
    integer: bool = False
    """Whether it holds token ids or indices, which have no gradient."""
    also: tuple[str, ...] = ()
    """Names used elsewhere, accepted in the module and right under its block; its own name: right under the block."""

    @property
    def position_axis(self) -> int:
        """The place of l in its shape: 1, but for attention patterns b Q l m."""
        axes = self.shape.split()
        return axes.index("l") if "l" in axes else 1

    @property
    def is_default(self) -> bool:
        """Whether a cache without a filter holds this site."""
        return self.kind == "point" if self.default is None else self.default


@dataclass(frozen=True)
class Child:
    """The place, in order of computation, of a submodule with its own sites."""

    name: str
    module: type | None = None
    """Its class, for tables of models that were never built."""
    symbols: Mapping[str, str] = field(default_factory=dict)
    """The child's symbols -> those used here: a norm's width "w" is "d" in a block."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Hook -> what stands there, where the child's own text can be more precise here."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Names used elsewhere, right under the block -> the child's hook."""
    called: tuple[str, ...] = ()
    """Other names of the child itself: TransformerLens' ln1 is our norm."""

    def here(self, row: Site) -> Site:
        """A row of the child, in the symbols of this place."""
        shape = " ".join(renamed(axis, self.symbols) for axis in row.shape.split())
        return replace(row, shape=shape, text=self.texts.get(row.name, row.text))


@dataclass(frozen=True)
class PlacedSite:
    """A site in one model: its full name, its row, and the sizes of its axes."""

    name: str
    row: Site
    sizes: Mapping[str, int]

    def shape(self, batch: int, length: int, keys: int | None = None) -> tuple[int, ...]:
        """The shape of its value at `length` positions. Keys m; None: those of this call alone, `length`."""
        sizes = {"m": length if keys is None else keys, **self.sizes, "b": batch, "l": length}
        return tuple(size_of(axis, sizes) for axis in self.row.shape.split())

    def nbytes(self, batch: int, length: int, itemsize: int, keys: int | None = None) -> int:
        """Bytes of its value; `itemsize` is that of the model's dtype, `keys` as in :meth:`shape`."""
        size = 8 if self.row.integer else max(itemsize, 4) if self.row.wide else itemsize
        return math.prod(self.shape(batch, length, keys)) * size

    @property
    def width(self) -> int:
        """Numbers per position."""
        return math.prod(self.shape(1, 1)[2:])

    @property
    def axes(self) -> dict[str, int]:
        """Named axes after batch and position -> their index: {"head": 2, "state": 4} for "b l H P N"."""
        symbols = self.row.shape.split()
        return {AXES[symbol]: i for i, symbol in enumerate(symbols) if symbol in AXES}

    def single(self, t: int) -> PlacedSite:
        """The state after one position, which has no position axis."""
        row = replace(self.row, shape=self.row.shape.replace("b l ", "b "), text=self.row.single, kind="point")
        return replace(self, name=f"{self.name}.{t}", row=row)


def size_of(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis such as "E", "1" or "R+2N".

    Raises
    ------
    KeyError
        A symbol that the module's `sizes` do not have.
    """
    total = 0
    for term in axis.split("+"):
        match = re.fullmatch(r"(\d*)(\w*)", term)
        if match is None or (match[2] and match[2] not in sizes):
            raise KeyError(f"axis {axis!r} has no size: the module gives {', '.join(sizes)}")
        total += int(match[1] or 1) * (sizes[match[2]] if match[2] else 1)
    return total


def renamed(axis: str, symbols: Mapping[str, str]) -> str:
    """An axis with its symbols replaced."""
    return "+".join(re.sub(r"[A-Za-z]\w*", lambda m: symbols.get(m[0], m[0]), term) for term in axis.split("+"))
