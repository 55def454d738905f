"""Options from mappings and files: unknown keys are errors that name the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hooked_mamba.local_paths import missing

T = TypeVar("T")


class OptionError(ValueError):
    """An option that does not exist, is missing, or has a value that cannot be."""


class RepeatedKeyError(ValueError):
    """A JSON object with a key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of `json.loads` that accepts each key once."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"has the key {twice[:200]!r} twice in one object")
    return values


def near(wrong: str, right: Sequence[str]) -> str:
    """Part of a message: the nearest valid choices."""
    found = difflib.get_close_matches(wrong[:200], right, n=2, cutoff=0.5)
    return f"; nearest: {', '.join(found)}" if found else f"; there are {', '.join(right)}"


def check_keys(what: str, values: Mapping[str, Any], known: Sequence[str], required: Sequence[str] = ()) -> None:
    """Raise OptionError for keys that do not exist and for missing ones."""
    for key in values:
        if key not in known:
            raise OptionError(f"{what} has no option {key!r}{near(str(key), known)}")
    missing = [key for key in required if key not in values]
    if missing:
        raise OptionError(f"{what} lacks {', '.join(missing)}")


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of options from a plain mapping.

    Raises
    ------
    OptionError
        For a key that is no field, or a field without default that is missing.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{cls.__name__} is made from a mapping of options, got {type(values).__name__}")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # a dataclass, by contract
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    check_keys(cls.__name__, values, [f.name for f in fields], required)
    floats = {f.name for f in fields if str(f.type) in ("float", "float | None")}
    return cls(**{key: _as_field(value, key in floats) for key, value in values.items()})


def _as_field(value: Any, is_float: bool) -> Any:
    """What a file has, as a field has it: lists as tuples, 1 as 1.0."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if is_float and isinstance(value, int) and not isinstance(value, bool) else value


def check_number(
    name: str, value: Any, low: float | int, high: float | int = float("inf"), whole: bool = False
) -> None:
    """Raise OptionError where a value is no number in [low, high]."""
    right_type = isinstance(value, int) if whole else isinstance(value, int | float)
    if not right_type or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        bounds = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be {kind} {bounds}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise OptionError where a value is none of the choices."""
    if value not in choices:
        names = [str(choice) for choice in choices]
        raise OptionError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{near(str(value), names)}"
        )


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON or TOML file, told apart by the ending.

    Raises
    ------
    OptionError
        If it is neither, or cannot be read as what it says it is.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(missing(path))
    if path.suffix not in (".json", ".toml"):
        raise OptionError(f"{path} must end in .json or .toml to be read as options")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text, object_pairs_hook=unique_keys) if path.suffix == ".json" else tomllib.loads(text)
    except RepeatedKeyError as error:
        raise OptionError(f"{path} {error}") from None
    except ValueError as error:
        raise OptionError(f"{path} is no {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    return values
