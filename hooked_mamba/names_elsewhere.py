"""Names of other libraries that users type from memory: a one-line error says what to use here.

A table maps a name to what to use; a text that starts with "none" says that there is no counterpart, and why. Tables
are in :mod:`hooked_mamba.transformerlens_names` and :mod:`saes.saelens_names`; docs/moving.md is made from them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

TRANSFORMER_LENS = "TransformerLens"
SAE_LENS = "SAELens"


def advice(name: str, uses: Mapping[str, str], library: str = TRANSFORMER_LENS) -> str:
    """One line: what to use here instead of another library's name."""
    use = uses[name]
    if use.startswith("none"):
        why = use.removeprefix("none").removeprefix(": ").removeprefix("; ")
        return f"{library}'s {name} has no counterpart here".replace("s's", "s'") + (f": {why}" if why else "")
    return f"{library}'s {name} is here: {use}".replace("s's", "s'")


def table(uses: Mapping[str, str]) -> str:
    """The rows of a Markdown table; names with the same counterpart share a row."""
    rows: dict[str, list[str]] = {}
    for name, use in uses.items():
        rows.setdefault(use, []).append(f"`{name}`")
    return "\n".join(f"| {', '.join(names)} | {use} |" for use, names in rows.items())


def import_advice(
    module: str, uses: Mapping[str, str], other: Callable[[str], Any] | None = None, library: str = TRANSFORMER_LENS
) -> Callable[[str], Any]:
    """A module's `__getattr__`: an ImportError, whose text `from module import name` shows.

    Parameters
    ----------
    other
        Called for names that are not in the table.
    library
        Whose names they are.
    """

    def find(name: str) -> Any:
        if name in uses:
            raise ImportError(advice(name, uses, library))
        if other is not None:
            return other(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


class _OtherModules:
    """Asked by Python for modules that nothing else finds."""

    def __init__(self, package: str, uses: Mapping[str, str], library: str) -> None:
        self.package, self.uses, self.library = package, uses, library

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Nothing; for a name in the table an ImportError that says what to use."""
        package, _, name = fullname.partition(".")
        if package == self.package and name in self.uses:
            raise ImportError(advice(name, self.uses, self.library), name=fullname)


def module_advice(package: str, uses: Mapping[str, str], library: str = TRANSFORMER_LENS) -> None:
    """From now on, `import package.name` of a name in the table, where there is no such module, says what to use."""
    if not any(isinstance(finder, _OtherModules) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.append(_OtherModules(package, uses, library))  # type: ignore[arg-type]


def knows_options(
    uses: Mapping[str, str],
    granted: Mapping[str, Any],
    library: str = TRANSFORMER_LENS,
    error: type[Exception] = TypeError,
) -> Callable[[F], F]:
    """A function whose unknown keyword arguments are looked up in a table.

    Parameters
    ----------
    uses
        Name of an argument elsewhere -> what to use here.
    granted
        Name -> the value that requests what is done here anyway; with that value the argument is dropped.
    library
        Whose names they are.
    error
        What is raised for a name in the table.
    """

    def wrap(function: F) -> F:
        taken = frozenset(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in [name for name in kwargs if name not in taken]:
                if name in granted and kwargs[name] is granted[name]:
                    del kwargs[name]
                elif name in uses:
                    raise error(f"{function.__name__} has no argument {name!r}: {advice(name, uses, library)}")
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return wrap
