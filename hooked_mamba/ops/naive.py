"""The equations as a loop over positions: the oracle that every other backend is held against.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t     (Gu & Dao 2023, equation 2a, A by zero-order hold, B Euler)
    y_t = C_t h_t + D x_t                        (equation 2b)

Gradients come from autograd. Any device, any floating-point type, natively with edits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.precision import to_state_dtype

TAKES_EDITS = True


def why_not(op: str, x: Tensor, N: int, asked: frozenset[str]) -> str | None:
    """Nothing is refused."""
    return None


def edited(h: Tensor, edits: StateEdits, i: int) -> Tensor:
    """The state h after the i-th edit."""
    for name, tensor in (("scale", edits.scale), ("add", edits.add)):
        if tensor is not None:
            full = tensor.to(h.dtype).expand(h.shape[0], len(edits.at), *h.shape[1:])
            h = h * full[:, i] if name == "scale" else h + full[:, i]
    return h


def selective_scan(
    x: Float[Tensor, "b l E"],
    dt: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"] | None,
    *,
    h0: Float[Tensor, "b E N"] | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits | None = None,
) -> ScanOut:
    """Mamba-1: every channel has N states and its own A."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    b, l, E = x.shape
    h = x.new_zeros(b, E, A.shape[1]) if h0 is None else h0
    ys, states = [], []
    for t in range(l):
        A_bar = torch.exp(dt[:, t, :, None] * A)
        B_bar = dt[:, t, :, None] * B[:, t, None, :]
        h = A_bar * h + B_bar * x[:, t, :, None]
        if edits is not None and t in edits.at:
            h = edited(h, edits, edits.at.index(t))
        ys.append((h * C[:, t, None, :]).sum(-1))
        if positions is not None and t in positions:
            states.append(h)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D * x
    return ScanOut(y.to(dtype), h, torch.stack(states, 1) if positions is not None else None)


def ssd(
    x: Float[Tensor, "b l H P"],
    dt: Float[Tensor, "b l H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    D: Float[Tensor, " H"] | None,
    *,
    h0: Float[Tensor, "b H P N"] | None,
    positions: tuple[int, ...] | None,
    chunk: int = 64,
    edits: StateEdits | None = None,
) -> ScanOut:
    """Mamba-2: a head has P x N states and one A; H/G heads share B and C. `chunk` changes nothing here."""
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    b, l, H, P = x.shape
    per_group = H // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    h = x.new_zeros(b, H, P, B.shape[3]) if h0 is None else h0
    ys, states = [], []
    for t in range(l):
        A_bar = torch.exp(dt[:, t] * A)[..., None, None]
        h = A_bar * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        if edits is not None and t in edits.at:
            h = edited(h, edits, edits.at.index(t))
        ys.append((h * C[:, t, :, None, :]).sum(-1))
        if positions is not None and t in positions:
            states.append(h)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + D[:, None] * x
    return ScanOut(y.to(dtype), h, torch.stack(states, 1) if positions is not None else None)


def linear_scan(
    a: Float[Tensor, "..."], b: Float[Tensor, "b l *rest"], *, h0: Float[Tensor, "..."] | None
) -> Float[Tensor, "b l *rest"]:
    """First-order recurrence h_t = a_t h_{t-1} + b_t over axis 1."""
    a = a.expand_as(b)
    h, out = h0, []
    for t in range(b.shape[1]):
        h = b[:, t] if h is None else a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)
