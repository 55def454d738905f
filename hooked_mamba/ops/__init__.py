"""The scans of Mamba-1 and Mamba-2: one signature per op, one file per backend, one choice of backend, here.

A backend is a module, imported when it is first needed. It holds functions named after the ops it can do,

    selective_scan(x, dt, A, B, C, D, *, h0, positions) -> ScanOut
    ssd(x, dt, A, B, C, D, *, h0, positions, chunk)     -> ScanOut
    linear_scan(a, b, *, h0)                            -> h
    causal_conv1d(x, weight, bias, history, silu)       -> y
    silu(x), softplus(x)                                -> y
    gated_scan(x, dt_pre, A, B, C, D, z, h0)            -> (y, h_last), or None for one step at a time; may be missing

and `why_not(op, x, N, asked) -> str | None`, the reason why it cannot do this call (None: it can), where
`asked` holds the names of the optional features in use: "h0", "states", "grad". Arguments arrive checked;
`positions` is an ascending tuple or None. `frozen` is settled here by detaching: a backend has only to skip
the gradients that nobody needs (`ctx.needs_input_grad`). Edits of the state are made by cutting the sequence,
unless the module says `TAKES_EDITS = True` and has an argument `edits`. `gated_scan` is called where a gradient is
wanted only if the module says `GATED_HAS_GRADIENT = True`. To add a backend, write such a module
and name it in `BACKENDS`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops import checks
from hooked_mamba.ops.interface import ScanOut as ScanOut
from hooked_mamba.ops.interface import StateEdits as StateEdits
from hooked_mamba.ops.segments import run_in_segments

BACKENDS: dict[str, dict[str, str]] = {
    "selective_scan": {
        "triton": "hooked_mamba.ops.triton",
        "numba": "hooked_mamba.ops.numba_scan",
        "torch": "hooked_mamba.ops.cpu",
        "naive": "hooked_mamba.ops.naive",
        "mamba_ssm": "hooked_mamba.ops.mamba_ssm_scan",
    },
    "ssd": {
        "triton": "hooked_mamba.ops.triton",
        "torch": "hooked_mamba.ops.chunked",
        "naive": "hooked_mamba.ops.naive",
        "mamba_ssm": "hooked_mamba.ops.mamba_ssm_scan",
    },
    "linear_scan": {
        "triton": "hooked_mamba.ops.triton",
        "torch": "hooked_mamba.ops.linear",
        "naive": "hooked_mamba.ops.naive",
    },
    "causal_conv1d": {
        "triton": "hooked_mamba.ops.triton",
        "numba": "hooked_mamba.ops.numba_elementwise",
        "torch": "hooked_mamba.ops.conv",
    },
    "silu": {"numba": "hooked_mamba.ops.numba_elementwise", "torch": "hooked_mamba.ops.elementwise"},
    "softplus": {"numba": "hooked_mamba.ops.numba_elementwise", "torch": "hooked_mamba.ops.elementwise"},
}
BACKENDS["gated_scan"] = BACKENDS["selective_scan"] | {"numba": "hooked_mamba.ops.numba_gated"}
"""Op -> backend -> module, the preferred first; "torch" refuses nothing, so what follows it is never chosen unasked."""

ENVIRONMENT = "HOOKED_MAMBA_SCAN"
"""Environment variable that names the backend of every op that has it, for calls that name none."""


@cache
def _load(module: str) -> ModuleType | str:
    """Import a backend's module; the reason as text if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"it needs the package {error.name!r}, which is not installed"
    except Exception as error:  # What is installed may fail in its own ways, and must not take the others along.
        reason = f"importing it failed ({type(error).__name__}: {error})"
        warnings.warn(f"{module} is left out: {reason}", stacklevel=2)
        return reason


def _refusal(module: ModuleType | str, op: str, x: Tensor, N: int, asked: frozenset[str]) -> str | None:
    return module if isinstance(module, str) else module.why_not(op, x, N, asked)


def choose(
    op: str, x: Tensor, N: int = 1, asked: frozenset[str] = frozenset(), backend: str | None = None
) -> ModuleType:
    """Choose the module that runs an op.

    Parameters
    ----------
    op
        "selective_scan", "ssd", "linear_scan", "causal_conv1d", "silu" or "softplus".
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
        modules = map(_load, table.values())
        return next(m for m in modules if not isinstance(m, str) and _refusal(m, op, x, N, asked) is None)
    if name not in table:
        known_elsewhere = any(name in other for other in BACKENDS.values())
        if source == ENVIRONMENT and known_elsewhere:
            return choose(op, x, N, asked, "auto")
        raise ValueError(f"{op}: {source} is {name!r}, expected one of {', '.join(map(repr, ('auto', *table)))}")
    module = _load(table[name])
    reason = _refusal(module, op, x, N, asked)
    if isinstance(module, str) or reason is not None:
        able = [n for n, m in table.items() if _refusal(_load(m), op, x, N, asked) is None]
        raise RuntimeError(
            f"{op}: {source} is {name!r}, but {reason}; able here: {', '.join(map(repr, ('auto', *able)))}"
        )
    return module


def _asked(h0: Tensor | None, positions: tuple[int, ...] | None, *tensors: Tensor | None) -> frozenset[str]:
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h0, *tensors))
    features = {"h0": h0 is not None, "states": positions is not None, "grad": grad}
    return frozenset(name for name, used in features.items() if used)


def _detached(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return dt.detach(), A.detach(), B.detach(), C.detach(), None if D is None else D.detach()


def selective_scan(
    x: Float[Tensor, "b l E"],
    dt: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"] | None = None,
    *,
    h0: Float[Tensor, "b E N"] | None = None,
    states_at: Sequence[int] | str | None = None,
    edits: StateEdits | None = None,
    frozen: bool = False,
    backend: str | None = None,
) -> ScanOut:
    """The selective scan of Mamba-1 (Gu & Dao 2023, equations 2a and 2b, A by zero-order hold, B by Euler).

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,      y_t = C_t h_t + D x_t

    Parameters
    ----------
    x
        Input, b l E. The state is float32, or float64 if x is float64.
    dt
        Step sizes after softplus, b l E. A step of 0 (padding) leaves the state as it is, bit for bit.
    A
        Negative reals, E N: -exp(A_log).
    B, C
        Input and output projections, b l N.
    D
        Skip weights, E; None for no skip.
    h0
        State before the first position, b E N; None for zeros.
    states_at
        Positions after which the state is returned, strictly ascending, or "all".
    edits
        Edits of the state on the way; gradients flow to their scale and add.
    frozen
        Take dt, A, B, C and D as constants: gradients reach x and h0 only, at the cost of the adjoint alone.
    backend
        One of `BACKENDS["selective_scan"]`, "auto", or None (HOOKED_MAMBA_SCAN, else auto).

    Returns
    -------
    ScanOut
        y, h_last and states, all differentiable with respect to all inputs (once).

    Raises
    ------
    ValueError
        A shape, a position or a backend's name does not fit.
    RuntimeError
        The backend asked for cannot do this call.
    """
    op = "selective_scan"
    sizes: dict[str, int] = {}
    checks.expect(op, sizes, x=(x, "b l E"), dt=(dt, "b l E"), A=(A, "E N"), B=(B, "b l N"), C=(C, "b l N"))
    checks.expect(op, sizes, D=(D, "E"), h0=(h0, "b E N"))
    checks.expect_length(op, sizes["l"])
    positions = checks.positions_of(op, states_at, sizes["l"])
    edits = checks.checked_edits(op, edits, sizes["b"], sizes["l"], (sizes["E"], sizes["N"]))
    if frozen:
        dt, A, B, C, D = _detached(dt, A, B, C, D)
    module = choose(op, x, sizes["N"], _asked(h0, positions, x, dt, A, B, C, D), backend)
    if edits is None:
        return module.selective_scan(x, dt, A, B, C, D, h0=h0, positions=positions)
    if getattr(module, "TAKES_EDITS", False):
        return module.selective_scan(x, dt, A, B, C, D, h0=h0, positions=positions, edits=edits)
    return run_in_segments(module.selective_scan, (x, dt, B, C), A, D, h0=h0, positions=positions, edits=edits)


def gated_scan(
    x: Float[Tensor, "b l E"],
    dt_pre: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"],
    z: Float[Tensor, "b l E"],
    h0: Float[Tensor, "b E N"] | None,
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "b l E"], Float[Tensor, "b E N"]]:
    """The selective scan between softplus and gate, (scan(x, softplus(dt_pre)) + D x) silu(z), and the last state.

    In one pass where the backend has one for it (and for its gradient, if that is wanted), else step by step.

    Parameters
    ----------
    dt_pre
        Step sizes before softplus, b l E.
    z
        Gate before SiLU, b l E.
    x, A, B, C, D, h0, backend
        As in `selective_scan`.
    """
    tensors = (x, dt_pre, A, B, C, D, z, h0)
    asked = _asked(h0, None, *tensors)
    if x.dtype == z.dtype == dt_pre.dtype:
        module = choose("gated_scan", x, A.shape[1], asked, backend)
        fused = getattr(module, "gated_scan", None)
        if fused is not None and ("grad" not in asked or getattr(module, "GATED_HAS_GRADIENT", False)):
            op, sizes = "gated_scan", dict[str, int]()
            checks.expect(op, sizes, x=(x, "b l E"), dt_pre=(dt_pre, "b l E"), z=(z, "b l E"))
            checks.expect(op, sizes, A=(A, "E N"), B=(B, "b l N"), C=(C, "b l N"), D=(D, "E"), h0=(h0, "b E N"))
            out = fused(*tensors)
            if out is not None:
                return out
    y, h_last, _ = selective_scan(x, softplus(dt_pre), A, B, C, h0=h0, backend=backend)
    return (y + (D * x).to(x.dtype)) * silu(z), h_last


def ssd(
    x: Float[Tensor, "b l H P"],
    dt: Float[Tensor, "b l H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    D: Float[Tensor, " H"] | None = None,
    *,
    h0: Float[Tensor, "b H P N"] | None = None,
    states_at: Sequence[int] | str | None = None,
    edits: StateEdits | None = None,
    frozen: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
) -> ScanOut:
    """The scan of Mamba-2: state-space duality (Dao & Gu 2024, section 6), one decay per head.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,    y_t = h_t C_t + D x_t       (per head; h is P x N)

    Parameters
    ----------
    x
        Input, b l H P. The state is float32, or float64 if x is float64.
    dt
        Step sizes after softplus and clamp, b l H. A step of 0 leaves the state as it is, bit for bit.
    A
        Negative reals, H.
    B, C
        Input and output projections, b l G N; head h uses group h // (H / G).
    D
        Skip weights, H; None for no skip.
    h0
        State before the first position, b H P N; None for zeros.
    states_at, edits, frozen, backend
        As in `selective_scan`.
    chunk
        Positions that are handled together as matrix products; None: 64, or fewer for a short sequence. Scans of
        pieces of a sequence give the bits of a scan of the whole if they name the same chunk.

    Returns
    -------
    ScanOut
        y, h_last and states, all differentiable with respect to all inputs (once).

    Raises
    ------
    ValueError
        A shape, a position, the chunk or a backend's name does not fit.
    RuntimeError
        The backend asked for cannot do this call.
    """
    op = "ssd"
    sizes: dict[str, int] = {}
    checks.expect(op, sizes, x=(x, "b l H P"), dt=(dt, "b l H"), A=(A, "H"), B=(B, "b l G N"), C=(C, "b l G N"))
    checks.expect(op, sizes, D=(D, "H"), h0=(h0, "b H P N"))
    checks.expect_length(op, sizes["l"])
    H, G, l = sizes["H"], sizes["G"], sizes["l"]
    if H % G:
        raise ValueError(f"{op}: {H} heads do not divide into {G} groups of B and C")
    if chunk is None:
        chunk = default_chunk(l)
    if chunk < 1:
        raise ValueError(f"{op}: chunk is {chunk}, expected at least 1")
    positions = checks.positions_of(op, states_at, l)
    edits = checks.checked_edits(op, edits, sizes["b"], l, (H, sizes["P"], sizes["N"]))
    if frozen:
        dt, A, B, C, D = _detached(dt, A, B, C, D)
    module = choose(op, x, sizes["N"], _asked(h0, positions, x, dt, A, B, C, D), backend)
    if edits is None:
        return module.ssd(x, dt, A, B, C, D, h0=h0, positions=positions, chunk=chunk)
    if getattr(module, "TAKES_EDITS", False):
        return module.ssd(x, dt, A, B, C, D, h0=h0, positions=positions, chunk=chunk, edits=edits)
    return run_in_segments(module.ssd, (x, dt, B, C), A, D, h0=h0, positions=positions, edits=edits, chunk=chunk)


def default_chunk(length: int) -> int:
    """Positions per chunk for a sequence of this length: 64, or the next multiple of 8 of a shorter one."""
    return min(64, -(-length // 8) * 8)


def linear_scan(
    a: Float[Tensor, "..."],
    b: Float[Tensor, "b l *rest"],
    *,
    h0: Float[Tensor, "..."] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b l *rest"]:
    """The first-order recurrence h_t = a_t h_{t-1} + b_t over axis 1.

    Parameters
    ----------
    a
        Decays, anything that broadcasts to b; may be 0 or negative.
    b
        Inputs, b l and any further axes.
    h0
        State before the first position, shaped like b without its axis l; None for zeros.
    backend
        One of `BACKENDS["linear_scan"]`, "auto" or None.

    Returns
    -------
    Tensor
        h at every position, shaped like b. It is kept for the backward: do not write into it.

    Raises
    ------
    ValueError
        A shape or a backend's name does not fit.
    """
    op = "linear_scan"
    if b.ndim < 2:
        raise ValueError(f"{op}: b has shape {tuple(b.shape)}, expected at least the axes b and l")
    checks.expect_length(op, b.shape[1])
    try:
        fits = torch.broadcast_shapes(a.shape, b.shape) == b.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{op}: a has shape {tuple(a.shape)}, which does not broadcast to {tuple(b.shape)}")
    wanted = (b.shape[0], *b.shape[2:])
    if h0 is not None and tuple(h0.shape) != wanted:
        raise ValueError(f"{op}: h0 has shape {tuple(h0.shape)}, expected {wanted}")
    module = choose(op, b, 1, _asked(h0, None, a, b), backend)
    return module.linear_scan(a, b, h0=h0)


def causal_conv1d(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c 1 k"],
    bias: Float[Tensor, " c"] | None,
    *,
    history: Float[Tensor, "b h c"] | None = None,
    silu: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "b m c"]:
    """Depthwise convolution, out_t = sum_k weight[k] x_{t+k} + bias, m = h + l - k + 1 positions long.

    With the k-1 inputs before the sequence (zeros at its start) as `history` this is causal.

    Parameters
    ----------
    history
        Inputs in front of x; None where x holds them itself.
    silu
        Apply SiLU as well, in the same pass where the backend can: for callers that look at nothing in between.
    backend
        One of `BACKENDS["causal_conv1d"]`, "auto" or None.

    Raises
    ------
    ValueError
        x with its history is shorter than the kernel, or there is no backend of that name.
    """
    op = "causal_conv1d"
    rows = x.shape[1] + (0 if history is None else history.shape[1])
    if rows < weight.shape[-1]:
        raise ValueError(f"{op}: x and its history have {rows} positions, expected at least k={weight.shape[-1]}")
    module = choose(op, x, 1, _asked(None, None, x, history, weight, bias), backend)
    return module.causal_conv1d(x, weight, bias, history, silu)


def silu(x: Float[Tensor, "..."], *, backend: str | None = None) -> Float[Tensor, "..."]:
    """x sigmoid(x), elementwise; `backend` is one of `BACKENDS["silu"]`, "auto" or None."""
    return choose("silu", x, 1, _asked(None, None, x), backend).silu(x)


def softplus(x: Float[Tensor, "..."], *, backend: str | None = None) -> Float[Tensor, "..."]:
    """log(1 + e^x), elementwise; `backend` is one of `BACKENDS["softplus"]`, "auto" or None."""
    return choose("softplus", x, 1, _asked(None, None, x), backend).softplus(x)
