"""Edits of the state for backends that know none: cut the sequence after every edited position.

As in `hooked_mamba.ops.segments`: run up to and including the edited position, edit the state that comes out, read that
position again, go on. What was recalled at the edited position was recalled before the edit, and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hooked_mamba.ops.interface import DeltaScanOut, StateEdits
from hooked_mamba.ops.segments import edited


def run_in_segments(
    scan: Callable[..., DeltaScanOut],
    over_time: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    h0: Tensor | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits,
) -> DeltaScanOut:
    """Run a backend's `delta_scan` with edits; `over_time` are r, w, k, v, a, b, cut along axis 1."""
    length, dtype = over_time[3].shape[1], over_time[3].dtype
    cuts = sorted({0, length, *(p + 1 for p in edits.at)})
    # One split, not a slice per segment: its backward is one concatenation.
    pieces = zip(*(t.split([stop - start for start, stop in pairwise(cuts)], 1) for t in over_time), strict=True)
    ys, recalls, states, h = [], [], [], h0
    for i, ((start, stop), piece) in enumerate(zip(pairwise(cuts), pieces, strict=True)):
        is_edited = i < len(edits.at)
        wanted = [p - start for p in positions or () if start <= p < stop]
        last_wanted = is_edited and stop - start - 1 in wanted
        inside = tuple(wanted[:-1] if last_wanted else wanted)
        y, h, kept, recall = scan(*piece, h0=h, positions=inside or None)
        if kept is not None:
            states.append(kept)
        if is_edited:
            h = edited(h, edits, i)
            r = piece[0][:, -1].to(h.dtype)
            y = torch.cat([y[:, :-1], (h @ r.unsqueeze(-1)).squeeze(-1).unsqueeze(1).to(dtype)], 1)
            if last_wanted:
                states.append(h.unsqueeze(1))
        ys.append(y)
        recalls.append(recall)
    assert h is not None  # there is at least one segment
    return DeltaScanOut(torch.cat(ys, 1), h, torch.cat(states, 1) if states else None, torch.cat(recalls, 1))
