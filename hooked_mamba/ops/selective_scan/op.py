"""The selective scan of Mamba-1, alone and between softplus and gate, and backwards with all but x held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.ops import checks
from hooked_mamba.ops.choose import asked_of, choose
from hooked_mamba.ops.elementwise.op import silu, softplus
from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.segments import run_with_edits


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
        dt, A, B, C = (t.detach() for t in (dt, A, B, C))
        D = None if D is None else D.detach()
    chosen = choose(op, x, sizes["N"], asked_of(h0, positions, x, dt, A, B, C, D), backend)
    return run_with_edits(chosen, (x, dt, B, C), A, D, h0=h0, positions=positions, edits=edits)


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
    asked = asked_of(h0, None, *tensors)
    if x.dtype == z.dtype == dt_pre.dtype:
        chosen = choose("gated_scan", x, A.shape[1], asked - {"grad"}, backend)
        if asked <= chosen.takes:
            op, sizes = "gated_scan", dict[str, int]()
            checks.expect(op, sizes, x=(x, "b l E"), dt_pre=(dt_pre, "b l E"), z=(z, "b l E"))
            checks.expect(op, sizes, A=(A, "E N"), B=(B, "b l N"), C=(C, "b l N"), D=(D, "E"), h0=(h0, "b E N"))
            out = chosen.run(*tensors)
            if out is not None:
                return out
    y, h_last, _ = selective_scan(x, softplus(dt_pre), A, B, C, h0=h0, backend=backend)
    return (y + (D * x).to(x.dtype)) * silu(z), h_last


def pull_scan(
    v: Float[Tensor, "n l E"],
    rows: Int[Tensor, " n"],
    dt: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"],
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "n l E"], Float[Tensor, "n E N"]]:
    """Covectors on y as covectors on x and on h0, with dt, A, B, C and D held: one scan in reverse.

        g_t = A_bar_{t+1} g_{t+1} + C_t v_t        on x_t: dt_t B_t g_t + D v_t        on h0: A_bar_1 g_1

    Parameters
    ----------
    v
        Covectors.
    rows
        The row of dt, B and C that each of them belongs to.
    dt, A, B, C, D, backend
        As in `selective_scan`.

    Raises
    ------
    ValueError
        A shape or a backend's name does not fit.
    """
    op, sizes = "pull_scan", dict[str, int]()
    checks.expect(op, sizes, dt=(dt, "b l E"), A=(A, "E N"), B=(B, "b l N"), C=(C, "b l N"), D=(D, "E"))
    checks.expect(op, sizes, v=(v, "n l E"))
    if rows.shape != v.shape[:1]:
        raise ValueError(f"{op}: rows has shape {list(rows.shape)}, expected a row for each of {len(v)} covectors")
    found = choose(op, v, A.shape[1], backend=backend).run(v, rows, dt, A, B, C, D)
    if found is not None:
        return found
    with torch.enable_grad():
        x = v.new_zeros(v.shape, requires_grad=True)
        h0 = v.new_zeros(len(v), *A.shape, requires_grad=True)
        y = selective_scan(x, dt[rows], A, B[rows], C[rows], D, h0=h0, frozen=True, backend=backend).y
        at_x, at_h0 = torch.autograd.grad(y, [x, h0], v)
    return at_x, at_h0
