"""Annotations are checked in tests, and most of a small model's time would go into checking the same ones again.

Imported before anything of the package, whose functions are decorated as their modules are imported.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping

CALLS = 4
"""In each test, the first calls of every function are checked; `make test-all` checks all."""

_jaxtyped = jaxtyping.jaxtyped
_checked: Counter[Callable] = Counter()
_most: float = CALLS


def anew(most: float) -> None:
    """Check the next `most` calls of every function."""
    global _most
    _most = most
    _checked.clear()


def _sparingly(*args: Any, **kwargs: Any) -> Any:
    """jaxtyped, of lasting functions alone: each call makes inner ones anew, and compiling their checks each time took
    nine tenths of a small model's forward."""
    decorate = _jaxtyped(*args, **kwargs)
    if args or not callable(decorate):
        return decorate

    def decorated(fn: Callable) -> Callable:
        if "<locals>" in fn.__qualname__:
            return fn
        if not inspect.isfunction(fn):
            return decorate(fn)
        checks: Callable | None = None

        @functools.wraps(fn)
        def at_first(*args: Any, **kwargs: Any) -> Any:
            nonlocal checks
            if _checked[fn] >= _most or jaxtyping.config.jaxtyping_disable:
                return fn(*args, **kwargs)
            _checked[fn] += 1
            checks = checks or decorate(fn)  # not above: to compile the checks of all functions takes seconds
            return checks(*args, **kwargs)

        return at_first

    return decorated


jaxtyping.jaxtyped = _sparingly
