"""The keys of a GGUF file, by type, with errors that name file and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hooked_mamba.loading.tables import CheckpointError

__all__ = ["FILE", "Keys", "shown", "text_of"]

FILE = "hooked_mamba.file"
"""Where the file's own path stands among its keys when it is opened here."""

ARCHITECTURE = "general.architecture"


class Keys:
    """What a file says of its model; names are given without the architecture in front.

    Parameters
    ----------
    values
        Values by full key, and the file's path under :data:`FILE`.

    Raises
    ------
    CheckpointError
        The architecture is missing or no text.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.path = values, Path(values.get(FILE, "this GGUF file"))
        self.architecture = values.get(ARCHITECTURE)
        if not isinstance(self.architecture, str):
            found = ", ".join(sorted(name for name in values if name != FILE)[:6]) or "none"
            raise CheckpointError(
                f"{self.path} has no key {ARCHITECTURE} that names its architecture; its first keys are {found}"
            )

    def full(self, name: str) -> str:
        """A key with the architecture in front."""
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        """Whether the file says anything of this."""
        return self.full(name) in self.values

    def fault(self, name: str, expected: str) -> CheckpointError:
        """The error for a value that cannot be meant."""
        if not self.has(name):
            return CheckpointError(f"{self.path} lacks the key {self.full(name)}; expected {expected}")
        value = self.values[self.full(name)]
        return CheckpointError(f"{self.path}: the key {self.full(name)} is {shown(value)}; expected {expected}")

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; without a default the key must be there."""
        if default is not None and not self.has(name):
            return default
        value = self.values.get(self.full(name))
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.fault(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None, positive: bool = True) -> float:
        """A finite number; without a default the key must be there."""
        if default is not None and not self.has(name):
            return default
        value = self.values.get(self.full(name))
        if not isinstance(value, float | int) or isinstance(value, bool) or not np.isfinite(value):
            raise self.fault(name, "a finite number")
        if positive and value <= 0:
            raise self.fault(name, "a number above zero")
        return as_written(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(self.full(name), default)
        if not isinstance(value, bool):
            raise self.fault(name, "a boolean")
        return value

    def counts(self, name: str, length: int) -> list[int]:
        """A whole number for each layer; one number alone is meant for all."""
        value = self.values.get(self.full(name))
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value] * length
        if not isinstance(value, np.ndarray | Sequence) or isinstance(value, str) or len(value) != length:
            raise self.fault(name, f"a whole number for each of the {length} layers")
        found = [int(one) for one in value]
        if not all(0 <= one < 2**31 for one in found) or any(not isinstance(one, int | np.integer) for one in value):
            raise self.fault(name, "whole numbers from 0 on")
        return found

    def token(self, name: str) -> int | None:
        """The id of a special token, where the file names one."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) else None


def shown(value: Any) -> str:
    """A value in an error: of a list its length."""
    return f"{len(value):,} entries" if isinstance(value, list | np.ndarray) else repr(value)[:60]


def text_of(values: Mapping[str, Any], key: str, default: str | None = None) -> str | None:
    """A text by its full key; arrays and numbers, which can be compared with none, become what errors show of them."""
    value = values.get(key, default)
    return value if isinstance(value, str | None) else shown(value)


def as_written(value: float) -> float:
    """The shortest decimal that is this float32, which is what a config's 1e-5 was before it came into the file."""
    return float(str(np.float32(value))) if isinstance(value, float) else float(value)
