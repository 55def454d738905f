"""The delta rule as a loop over positions: the oracle that every other backend is held against.

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,      y_t = S_t r_t,      recall_t = S_{t-1} a_t

Gradients come from autograd. Any device, any floating-point type, any decay, natively with edits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import DeltaScanOut, StateEdits
from hooked_mamba.ops.precision import state_dtype
from hooked_mamba.ops.segments import edited


def full(b: Float[Tensor, "b l H B"], k: Float[Tensor, "b l H K"]) -> Float[Tensor, "b l H K"]:
    """The vectors b where they were given as multiples of k."""
    return b * k if b.shape[3] < k.shape[3] else b


@backend("delta_scan", takes={"h0", "states", "grad", "edits"})
def delta_scan(
    r: Float[Tensor, "b l H K"],
    w: Float[Tensor, "b l H W"],
    k: Float[Tensor, "b l H K"],
    v: Float[Tensor, "b l H V"],
    a: Float[Tensor, "b l H K"],
    b: Float[Tensor, "b l H B"],
    *,
    h0: Float[Tensor, "b H V K"] | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits | None = None,
) -> DeltaScanOut:
    """See `hooked_mamba.ops.delta_scan`."""
    dtype, work = v.dtype, state_dtype(v)
    r, w, k, v, a, b = (t.to(work) for t in (r, w, k, v, a, b))
    b = full(b, k)
    S = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[3]) if h0 is None else h0.to(work)
    ys, recalls, states = [], [], []
    for t in range(v.shape[1]):
        recall = (S * a[:, t, :, None]).sum(-1)
        S = S * w[:, t, :, None] + recall[..., None] * b[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        if edits is not None and t in edits.at:
            S = edited(S, edits, edits.at.index(t))
        ys.append((S * r[:, t, :, None]).sum(-1))
        recalls.append(recall)
        if positions is not None and t in positions:
            states.append(S)
    y, recall = (torch.stack(each, 1).to(dtype) for each in (ys, recalls))
    return DeltaScanOut(y, S, torch.stack(states, 1) if states else None, recall)
