"""Reading a checkpoint by table: which field and which weight there is which one here.

Each file of a checkpoint family holds two tables and a pair of functions over them. `FIELDS` maps the
config, `WEIGHTS` the tensors; a weight that maps to None is dropped, one in no table keeps its name and is
reported as unexpected when the weights are assigned.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "REQUIRED",
    "CheckpointError",
    "Field",
    "LazyState",
    "check_known",
    "from_ours_weights",
    "read_fields",
    "reject",
    "to_ours_weights",
    "write_fields",
]


NAMES_SHOWN = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that says what this package cannot express."""


def some(names: Iterable[str]) -> str:
    """The first names of a list that may be long, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
"""Default of a field without which there is no model."""


@dataclass(frozen=True)
class Field:
    """One row of a config table."""

    ours: str
    """Name in :class:`~hooked_mamba.config.MambaConfig` or :class:`~hooked_mamba.config.Mamba2Config`."""
    theirs: str
    """Name in the checkpoint's config."""
    default: Any = REQUIRED
    """What an absent field means in that format."""


def read_fields(config: Mapping[str, Any], fields: Sequence[Field], what: str) -> dict[str, Any]:
    """Values under our names, with the format's own defaults for what is absent.

    Raises
    ------
    CheckpointError
        Listing every field without a default that `config` lacks.
    """
    absent = [row.theirs for row in fields if row.default is REQUIRED and row.theirs not in config]
    if absent:
        raise CheckpointError(f"{what} lacks {', '.join(absent)}; it has {', '.join(sorted(config)) or 'nothing'}")
    return {row.ours: config.get(row.theirs, row.default) for row in fields}


def write_fields(cfg: Any, fields: Sequence[Field]) -> dict[str, Any]:
    """The values of `cfg` under the names of the checkpoint's format."""
    return {row.theirs: getattr(cfg, row.ours) for row in fields}


def check_known(config: Mapping[str, Any], known: set[str], what: str) -> None:
    """Refuse a field nobody reads: it may shape the model, and dropping it would change results silently."""
    for key in config:
        if key not in known and not key.startswith("_"):  # an underscore marks a remark, as in _name_or_path
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(f"{what} has the field {key!r}, which is not known here{hint}")


def reject(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """Refuse any value that `allowed` does not list for its field; an absent field is fine."""
    for key, choices in allowed.items():
        if key in config and config[key] not in choices:
            expected = " or ".join(repr(choice) for choice in choices)
            raise CheckpointError(f"{what} has {key}={config[key]!r}, which is not supported; expected {expected}")


class Place(NamedTuple):
    """Where a tensor stands, for errors: what its file calls it, and that file."""

    tensor: str
    file: str | None = None
    changed: bool = False
    """Whether it has another shape there than here."""
    rows: tuple[str, ...] = ()
    """The tensors that stand one behind the other on its first axis here, where it is made of several."""

    def __str__(self) -> str:
        return self.tensor if self.file is None else f"{self.tensor} in {self.file}"


class LazyState(Mapping[str, Tensor]):
    """A read-only state dict whose tensors are made when asked for, so that none is held in memory.

    Parameters
    ----------
    getters
        Name -> what makes the tensor.
    places
        Name -> where it stands, of those that have another name there or of which the file is known.
    expected
        Name here -> what the format calls it, also of weights that are not there.
    """

    def __init__(
        self,
        getters: Mapping[str, Callable[[], Tensor]],
        places: Mapping[str, Place] | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> None:
        self._getters = dict(getters)
        self._places, self.expected = dict(places or {}), dict(expected or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._getters[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._getters)

    def __len__(self) -> int:
        return len(self._getters)

    def __contains__(self, name: object) -> bool:
        return name in self._getters

    def getter(self, name: str) -> Callable[[], Tensor]:
        """What makes the tensor `name`."""
        return self._getters[name]

    def place(self, name: str) -> Place:
        """Where a tensor stands; of one that is not there, where it should: no file is known then."""
        return self._places.get(name) or Place(self.expected.get(name, name))

    @property
    def files(self) -> list[str]:
        """Files that tensors come from."""
        return sorted({place.file for place in self._places.values() if place.file is not None})

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> LazyState:
        """Any state dict as a lazy one; its tensors are shared, not copied."""
        return state if isinstance(state, cls) else cls({name: _getter(state, name) for name in state})

    def renamed(self, names: Mapping[str, str]) -> LazyState:
        """The same tensors, each under `names[its name]`."""
        getters = {names[name]: getter for name, getter in self._getters.items()}
        return LazyState(getters, {names[name]: self.place(name) for name in self}, self.expected)

    def expecting(self, prefix: str) -> LazyState:
        """The same state of a format whose names all begin with a prefix more."""
        return LazyState(self._getters, self._places, {n: f"{prefix}{theirs}" for n, theirs in self.expected.items()})

    def with_changed(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> LazyState:
        """The same state with the tensors named in `changes` passed through a function when read."""

        def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
            return lambda: change(self[name])

        here = {name: change for name, change in changes.items() if name in self}
        places = {name: self.place(name)._replace(changed=True) for name in here}
        return LazyState(
            self._getters | {n: changed(n, f) for n, f in here.items()}, self._places | places, self.expected
        )

    def without(self, *names: str) -> LazyState:
        """The same state without `names`."""
        getters = {n: getter for n, getter in self._getters.items() if n not in names}
        return LazyState(getters, {n: place for n, place in self._places.items() if n in getters}, self.expected)

    def with_copy(self, source: str, target: str) -> LazyState:
        """The same state with the tensor `source` also under the name `target`."""
        places = self._places | {target: self.place(source)}
        return LazyState(self._getters | {target: self._getters[source]}, places, self.expected)


def _expand(weights: Mapping[str, str | None], n_layers: int) -> dict[str, str | None]:
    table: dict[str, str | None] = {}
    for theirs, ours in weights.items():
        for i in range(n_layers if "{i}" in theirs else 1):
            table[theirs.format(i=i)] = None if ours is None else ours.format(i=i)
    return table


def _getter(state: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: state[name]


def to_ours_weights(state: Mapping[str, Tensor], weights: Mapping[str, str | None], n_layers: int) -> LazyState:
    """Tensors of a checkpoint under our names.

    Parameters
    ----------
    state
        The checkpoint's tensors by name.
    weights
        Their name -> our name, `{i}` standing for the block; two names for one weight are both accepted,
        None drops the tensor.
    n_layers
        Number of blocks.

    Raises
    ------
    CheckpointError
        Two tensors for one weight.
    """
    table, given = _expand(weights, n_layers), LazyState.of(state)
    getters: dict[str, Callable[[], Tensor]] = {}
    came_from: dict[str, str] = {}
    for theirs in given:
        ours = table.get(theirs, theirs)
        if ours is None:
            continue
        if ours in came_from:
            raise CheckpointError(f"both {came_from[ours]!r} and {theirs!r} hold {ours!r}; expected one of them")
        came_from[ours] = theirs
        getters[ours] = given.getter(theirs)
    expected: dict[str, str] = {}
    for name, here in table.items():
        if here is not None:
            expected.setdefault(here, name)
    return LazyState(getters, {ours: given.place(theirs) for ours, theirs in came_from.items()}, expected)


def from_ours_weights(state: Mapping[str, Tensor], weights: Mapping[str, str | None], n_layers: int) -> LazyState:
    """The inverse of :func:`to_ours_weights`; of two names for one weight the table's first is written.

    Raises
    ------
    CheckpointError
        Listing the tensors that have no name in this format.
    """
    names: dict[str, str] = {}
    for theirs, ours in _expand(weights, n_layers).items():
        if ours is not None:
            names.setdefault(ours, theirs)
    unknown = [name for name in state if name not in names]
    if unknown:
        raise CheckpointError(f"no name in this format for {', '.join(unknown)}")
    return LazyState({names[name]: _getter(state, name) for name in state})
