"""The scan of the delta rule, whose transition is diagonal plus rank one: RWKV-7, (gated) DeltaNet, KDA."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops import checks
from hooked_mamba.ops.choose import asked_of, choose
from hooked_mamba.ops.delta_scan._segments import run_in_segments
from hooked_mamba.ops.interface import DeltaScanOut, StateEdits


def delta_scan(
    r: Float[Tensor, "b l H K"],
    w: Float[Tensor, "b l H W"],
    k: Float[Tensor, "b l H K"],
    v: Float[Tensor, "b l H V"],
    a: Float[Tensor, "b l H K"],
    b: Float[Tensor, "b l H B"],
    *,
    h0: Float[Tensor, "b H V K"] | None = None,
    states_at: Sequence[int] | str | None = None,
    edits: StateEdits | None = None,
    frozen: bool = False,
    backend: str | None = None,
) -> DeltaScanOut:
    """The scan of the delta rule, per head, with a state S of V x K: rows are values, columns are keys.

        S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,      y_t = S_t r_t,      recall_t = S_{t-1} a_t

    RWKV-7 (arXiv 2503.14456): a = kappa, b = -a_t kappa with its in-context learning rate a_t.
    Gated DeltaNet (arXiv 2412.06464): w = alpha, a = k, b = -alpha beta (times k), and beta v for v.
    Kimi Delta Attention (arXiv 2510.26692): w = alpha, a = alpha k, b = -beta (times k), and beta v for v.

    Parameters
    ----------
    r
        What the state is read with, b l H K.
    w
        Decays, b l H K, or b l H 1 for one per head; any numbers, 1 keeps the state.
    k, v
        Key and value that are written, b l H K and b l H V. The state is float32, or float64 if v is float64.
    a, b
        The rank-one part of the transition, b l H K. b may be b l H 1, for that multiple of k (if K is not 1): what is
        removed then lies under the key that is written, which saves work. Padding: w = 1, and k and b 0.
    h0
        State before the first position, b H V K; None for zeros.
    states_at
        Positions after which the state is returned, strictly ascending, or "all".
    edits
        Edits of the state on the way, which later removals see; gradients flow to their scale and add.
    frozen
        Take r, w, k, a and b as constants: gradients reach v and h0 only, by the same scan run from the end.
    backend
        One of `BACKENDS["delta_scan"]`, "auto", or None (HOOKED_MAMBA_SCAN, else auto).

    Returns
    -------
    DeltaScanOut
        y, h_last, states and recall, all differentiable with respect to all inputs (once).

    Raises
    ------
    ValueError
        A shape, a position or a backend's name does not fit.
    RuntimeError
        The backend asked for cannot do this call.
    """
    op = "delta_scan"
    sizes: dict[str, int] = {}
    checks.expect(op, sizes, r=(r, "b l H K"), k=(k, "b l H K"), v=(v, "b l H V"))
    checks.expect(op, sizes, a=(a, "b l H K"), h0=(h0, "b H V K"))
    for name, tensor in (("w", w), ("b", b)):
        checks.expect(op, sizes, **{name: (tensor, "b l H 1" if tensor.shape[-1:] == (1,) else "b l H K")})
    checks.expect_length(op, sizes["l"])
    positions = checks.positions_of(op, states_at, sizes["l"])
    edits = checks.checked_edits(op, edits, sizes["b"], sizes["l"], (sizes["H"], sizes["V"], sizes["K"]))
    if frozen:
        r, w, k, a, b = (t.detach() for t in (r, w, k, a, b))
    chosen = choose(op, v, sizes["K"], asked_of(h0, positions, r, w, k, v, a, b), backend)
    if edits is None:
        return chosen.run(r, w, k, v, a, b, h0=h0, positions=positions)
    if "edits" in chosen.takes:
        return chosen.run(r, w, k, v, a, b, h0=h0, positions=positions, edits=edits)
    return run_in_segments(chosen.run, (r, w, k, v, a, b), h0=h0, positions=positions, edits=edits)
