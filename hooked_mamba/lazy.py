"""Packages whose names are imported on first use, so that `import` and `--help` are fast."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def names_from_stub(init: str) -> dict[str, tuple[str, str]]:
    """Name -> (module, name there) of the re-exports in the `__init__.pyi` beside an `__init__.py`.

    Type checkers read the stub, so the list of public names is in one place.
    """
    tree = ast.parse(Path(init).with_suffix(".pyi").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return found


class LazyPackage(ModuleType):
    """A package some of whose names are those of modules in it too (`circuits.faithfulness`): the name wins.

    Importing a module binds it in its package, which would hide the name from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("__all__", ())):
            super().__setattr__(name, value)


def lazy(package: str, init: str, other: Callable[[str], Any] | None = None) -> tuple[Callable[[str], Any], list[str]]:
    """A package's `__getattr__` and `__all__`.

    Parameters
    ----------
    package, init
        Its `__name__` and `__file__`.
    other
        Called for names that are neither in the stub nor modules of the package, such as renamed ones.
    """
    names = names_from_stub(init)
    sys.modules[package].__class__ = LazyPackage

    def find(name: str) -> Any:
        if name in names:
            module, there = names[name]
            found = importlib.import_module(f"{package}.{there}") if module == package else None
            found = getattr(importlib.import_module(module), there) if found is None else found
            sys.modules[package].__dict__[name] = found  # asked for once
            return found
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        if other is not None:
            return other(name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, sorted(names)
