"""The scan of Mamba-2."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops import checks
from hooked_mamba.ops.choose import asked_of, choose
from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.segments import run_with_edits


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
        dt, A, B, C = (t.detach() for t in (dt, A, B, C))
        D = None if D is None else D.detach()
    chosen = choose(op, x, sizes["N"], asked_of(h0, positions, x, dt, A, B, C, D), backend)
    return run_with_edits(chosen, (x, dt, B, C), A, D, h0=h0, positions=positions, edits=edits, chunk=chunk)


def default_chunk(length: int) -> int:
    """Positions per chunk for a sequence of this length: 64, or the next multiple of 8 of a shorter one."""
    return min(64, -(-length // 8) * 8)
