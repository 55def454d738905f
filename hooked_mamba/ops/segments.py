"""Edits of the state for backends that know none: cut the sequence after every edited position.

    1. run up to and including the edited position,
    2. edit the state that comes out, and read that position out again from it,
    3. continue from the edited state.

Only the positions from the first edit on can change: what stands before is computed exactly as without edits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.choose import Backend
from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.precision import to_state_dtype


def run_with_edits(
    chosen: Backend,
    over_time: tuple[Tensor, Tensor, Tensor, Tensor],
    A: Tensor,
    D: Tensor | None,
    *,
    h0: Tensor | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits | None,
    **options: int,
) -> ScanOut:
    """Run a scan on a backend, in segments if there are edits and it takes none; arguments as in `run_in_segments`."""
    x, dt, B, C = over_time
    if edits is None:
        return chosen.run(x, dt, A, B, C, D, h0=h0, positions=positions, **options)
    if "edits" in chosen.takes:
        return chosen.run(x, dt, A, B, C, D, h0=h0, positions=positions, edits=edits, **options)
    return run_in_segments(chosen.run, over_time, A, D, h0=h0, positions=positions, edits=edits, **options)


def edited(h: Tensor, edits: StateEdits, i: int) -> Tensor:
    """The state h, batch first, after the i-th edit."""
    for name, tensor in (("scale", edits.scale), ("add", edits.add)):
        if tensor is not None:
            full = tensor.to(h.dtype).expand(h.shape[0], len(edits.at), *h.shape[1:])
            h = h * full[:, i] if name == "scale" else h + full[:, i]
    return h


def run_in_segments(
    scan: Callable[..., ScanOut],
    over_time: tuple[Tensor, Tensor, Tensor, Tensor],
    A: Tensor,
    D: Tensor | None,
    *,
    h0: Tensor | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits,
    **options: int,
) -> ScanOut:
    """Run a scan with edits of its state.

    Parameters
    ----------
    scan
        A backend's `selective_scan` or `ssd`, called as (x, dt, A, B, C, D, h0=, positions=, **options).
    over_time
        x, dt, B, C, cut along axis 1.
    """
    length = over_time[0].shape[1]
    cuts = sorted({0, length, *(p + 1 for p in edits.at)})
    sizes = [stop - start for start, stop in pairwise(cuts)]
    # One split, not a slice per segment: its backward is one concatenation.
    pieces = zip(*(t.split(sizes, 1) for t in over_time), strict=True)
    scale, add = (_per_edit(t, len(edits.at), h_ndim=over_time[0].ndim + 1) for t in edits[1:])
    ys, states, h = [], [], h0
    for i, ((start, stop), (x, dt, B, C)) in enumerate(zip(pairwise(cuts), pieces, strict=True)):
        wanted = [p - start for p in positions or () if start <= p < stop]
        is_edited = i < len(edits.at)
        last_wanted = is_edited and bool(wanted) and wanted[-1] == stop - start - 1
        inside = tuple(wanted[:-1] if last_wanted else wanted)
        y, h, kept = scan(x, dt, A, B, C, D, h0=h, positions=inside or None, **options)
        if kept is not None:
            states.append(kept)
        if is_edited:
            if scale is not None:
                h = h * scale[i].to(h.dtype)
            if add is not None:
                h = h + add[i].to(h.dtype)
            y = torch.cat([y[:, :-1], read_out(h, x[:, -1:], C[:, -1:], D)], 1)
            if last_wanted:
                states.append(h.unsqueeze(1))
        ys.append(y)
    assert h is not None  # there is at least one segment
    return ScanOut(torch.cat(ys, 1), h, torch.cat(states, 1) if states else None)


def _per_edit(tensor: Tensor | None, edits: int, h_ndim: int) -> tuple[Tensor, ...] | None:
    """One tensor per edit, each broadcasting to the state."""
    if tensor is None:
        return None
    tensor = tensor.reshape((1,) * (h_ndim - tensor.ndim) + tensor.shape)
    return tensor.expand(-1, edits, *(-1,) * (h_ndim - 2)).unbind(1)


def read_out(
    h: Float[Tensor, "b *state N"],
    x: Float[Tensor, "b 1 *state"],
    C: Float[Tensor, "b 1 *groups N"],
    D: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "b 1 *state"]:
    """y = C h + D x at one position, for both layouts of the state (b E N and b H P N)."""
    dtype = x.dtype
    h, x, C, D = to_state_dtype(h, x, C, D)
    b, N = h.shape[0], h.shape[-1]
    G = C.shape[2] if C.ndim == 4 else 1
    y = torch.matmul(h.reshape(b, G, -1, N), C.reshape(b, G, N, 1)).view(x.shape)
    if D is not None:
        y = torch.addcmul(y, D.view(-1, *(1,) * (x.ndim - 3)), x)
    return y.to(dtype)
