"""Hidden attention of the delta rule: how much of each value a read-out holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops import checks
from hooked_mamba.ops.delta_scan._adjoint import from_the_end
from hooked_mamba.ops.delta_scan.naive import full
from hooked_mamba.ops.delta_scan.op import delta_scan


def delta_rows(
    r: Float[Tensor, "b l H K"],
    w: Float[Tensor, "b l H W"],
    k: Float[Tensor, "b l H K"],
    a: Float[Tensor, "b l H K"],
    b: Float[Tensor, "b l H B"],
    queries: Sequence[int],
    *,
    backend: str | None = None,
) -> Float[Tensor, "b Q H l"]:
    """Rows alpha[t, :] of hidden attention, y_t = sum_s alpha[t, s] v_s, for chosen targets t.

        rho_t = r_t;      alpha[t, s] = k_s . rho_s;      rho_{s-1} = w_s rho_s + a_s (b_s . rho_s)

    The vectors rho of all targets are walked back together, as the rows of one state: `delta_scan` from the end, with a
    and b exchanged and ones at the targets for values. O(l K) a row and head.

    Parameters
    ----------
    r, w, k, a, b, backend
        As in `delta_scan`.
    queries
        Targets, strictly ascending.

    Returns
    -------
    Tensor
        Signed weights, b Q H l, in the dtype of r; 0 at sources after the target.

    Raises
    ------
    ValueError
        A target is outside the sequence, or they do not ascend.
    """
    batch, length, H, _ = r.shape
    b = full(b, k)
    at = checks.ascending("delta_rows", "queries", queries, length)
    if not at:
        return r.new_zeros(batch, 0, H, length)
    ones = torch.zeros(length, len(at), dtype=r.dtype, device=r.device)
    ones[list(at), range(len(at))] = 1
    out = delta_scan(*from_the_end(r, w, k, ones[None, :, None].expand(batch, -1, H, -1), a, b), backend=backend)
    return out.y.flip(1).permute(0, 3, 2, 1)
