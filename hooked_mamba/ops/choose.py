"""The registry of backends, and the only choice among them.

An op has a folder. `op.py` in it holds the public function: signature, docstring, checks. Every other file there whose
name has no underscore in front is a backend and gives it its name. A backend is imported when it is first asked, and
registers what it can do:

    @backend("ssd", takes={"h0", "states", "grad"})
    def ssd(x, dt, A, B, C, D, *, h0, positions, chunk) -> ScanOut: ...

To add a backend, put such a file into the folder; nothing else has to be told.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

ENVIRONMENT = "HOOKED_MAMBA_SCAN"
"""Environment variable that names the backend of every op that has it, for calls that name none."""

FOLDERS = {
    "selective_scan": "selective_scan",
    "gated_scan": "selective_scan",
    "pull_scan": "selective_scan",
    "ssd": "ssd",
    "delta_scan": "delta_scan",
    "linear_scan": "linear_scan",
    "causal_conv1d": "causal_conv1d",
    "silu": "elementwise",
    "softplus": "elementwise",
}
"""Op -> folder."""

ORDER = ("triton", "numba", "torch", "naive", "mamba_ssm")
"""The preferred first; "torch" refuses nothing, so what follows it is never chosen unasked. Others come first."""

COMPOSED = {"gated_scan": "selective_scan", "pull_scan": "selective_scan"}
"""Op made of others, which a backend may have in one pass -> the op whose limits are its own where it has not."""

LACKS = {
    "h0": "it starts from a state of zero",
    "states": "it does not save states",
    "grad": "it has no gradient",
    "edits": "it does not edit states",
}
"""Optional feature of a call -> how a backend that does not take it says so."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Backend:
    """One way of running one op."""

    op: str
    name: str
    run: Callable[..., Any]
    """Takes checked arguments; positions come as an ascending tuple or None."""
    takes: frozenset[str] = frozenset()
    """Optional features: some of `LACKS`. Edits that it does not take are made by cutting the sequence."""
    refuses: Callable[[Tensor, int], str | None] = lambda x, N: None
    """The reason why it cannot run on an input x with N states per channel; None: it can."""

    def refusal(self, x: Tensor, N: int, asked: frozenset[str]) -> str | None:
        """The reason why it cannot do this call; None: it can."""
        reason = self.refuses(x, N)
        if reason is not None or asked <= self.takes:
            return reason
        lacking = sorted(asked - self.takes - {"edits"})
        return LACKS[lacking[0]] if lacking else None


_REGISTERED: dict[tuple[str, str], Backend] = {}


def backend(
    op: str, *, takes: Iterable[str] = (), refuses: Callable[[Tensor, int], str | None] | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function as the way in which the backend named after its file runs an op.

    Parameters
    ----------
    op
        One of `FOLDERS`.
    takes
        The optional features it can do: "h0" (an initial state), "states" (at positions), "grad", "edits" of the state.
    refuses
        Called with the input x and the number N of states per channel: the reason why it cannot run on them, or None.
    """
    unknown = sorted(set(takes) - set(LACKS))
    if op not in FOLDERS or unknown:
        raise ValueError(f"no op {op!r} with {unknown or 'these features'}: ops {[*FOLDERS]}, features {[*LACKS]}")

    def register(function: Function) -> Function:
        name = function.__module__.rpartition(".")[2]
        entry = Backend(op, name, function, frozenset(takes))
        _REGISTERED[op, name] = entry if refuses is None else Backend(op, name, function, frozenset(takes), refuses)
        return function

    return register


def preference(name: str) -> tuple[int, str]:
    """Sorts names of backends, the preferred first."""
    return (ORDER.index(name) if name in ORDER else -1, name)


def backends_in(folder: Path) -> list[str]:
    """Names of the backends in an op's folder, the preferred first; nothing is imported."""
    names = [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_") and m.name != "op"]
    return sorted(names, key=preference)


def _table(op: str) -> dict[str, str]:
    folder = FOLDERS[op]
    return {name: f"hooked_mamba.ops.{folder}.{name}" for name in backends_in(Path(__file__).parent / folder)}


BACKENDS: dict[str, dict[str, str]] = {op: _table(op) for op in FOLDERS}
"""Op -> backend -> module, the preferred first."""


@cache
def _import(module: str) -> str | None:
    """Import a backend's module; the reason as text if it cannot be imported."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"it needs the package {error.name!r}, which is not installed"
    except Exception as error:  # What is installed may fail in its own ways, and must not take the others along.
        reason = f"importing it failed ({type(error).__name__}: {error})"
        warnings.warn(f"{module} is left out: {reason}", stacklevel=2)
        return reason
    return None


def _step_by_step(*arguments: Tensor | None) -> None:
    """A composed op that a backend has not in one pass: nothing, for which the op goes step by step."""


def _load(op: str, name: str) -> Backend | str:
    """A backend of an op; the reason as text if there is none to be had."""
    reason = _import(BACKENDS[op][name])
    if reason is not None:
        return reason
    found = _REGISTERED.get((op, name))
    if found is None and op in COMPOSED:
        whole = _load(COMPOSED[op], name)
        return whole if isinstance(whole, str) else Backend(op, name, _step_by_step, whole.takes, whole.refuses)
    return found or f"{BACKENDS[op][name]} registers no {op}"


def _refusal(found: Backend | str, x: Tensor, N: int, asked: frozenset[str]) -> str | None:
    return found if isinstance(found, str) else found.refusal(x, N, asked)


def asked_of(h0: Tensor | None, positions: tuple[int, ...] | None, *tensors: Tensor | None) -> frozenset[str]:
    """The optional features that a call uses."""
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h0, *tensors))
    features = {"h0": h0 is not None, "states": positions is not None, "grad": grad}
    return frozenset(name for name, used in features.items() if used)


def choose(op: str, x: Tensor, N: int = 1, asked: frozenset[str] = frozenset(), backend: str | None = None) -> Backend:
    """Choose the backend that runs an op.

    Parameters
    ----------
    op
        One of `FOLDERS`.
    x
        The input: its device and type decide.
    N
        Number of states per channel.
    asked
        Optional features in use: "h0", "states", "grad".
    backend
        A name from `BACKENDS[op]`; None or "auto" for the first that can. None also looks at the environment
        variable HOOKED_MAMBA_SCAN, which binds the ops that have a backend of that name.

    Raises
    ------
    ValueError
        No backend of that name; lists the valid ones.
    RuntimeError
        The named backend cannot do this call; says why and lists those that can.
    """
    table = BACKENDS[op]
    name, source = backend, "backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT
    if name == "auto":
        loaded = (_load(op, each) for each in table)
        return next(b for b in loaded if not isinstance(b, str) and b.refusal(x, N, asked) is None)
    if name not in table:
        known_elsewhere = any(name in other for other in BACKENDS.values())
        if source == ENVIRONMENT and known_elsewhere:
            return choose(op, x, N, asked, "auto")
        raise ValueError(f"{op}: {source} is {name!r}, expected one of {', '.join(map(repr, ('auto', *table)))}")
    found = _load(op, name)
    reason = _refusal(found, x, N, asked)
    if isinstance(found, str) or reason is not None:
        able = [each for each in table if _refusal(_load(op, each), x, N, asked) is None]
        raise RuntimeError(
            f"{op}: {source} is {name!r}, but {reason}; able here: {', '.join(map(repr, ('auto', *able)))}"
        )
    return found
