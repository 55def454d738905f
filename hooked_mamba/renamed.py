"""Names that changed: the old one works for one release, with a warning that gives the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """A DeprecationWarning that names the new name; `stacklevel` as in `warnings.warn`, counted from the caller."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel + 1)


def renamed_in(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` for names that moved.

    Parameters
    ----------
    module
        The module's `__name__`.
    names
        Old name -> full path of the new one, "package.module.name".
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(".")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(importlib.import_module(home), new)

    return find
