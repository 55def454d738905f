"""The types that every backend of the scan speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ScanOut(NamedTuple):
    """What a selective scan returns.

    Shapes for Mamba-1 (`selective_scan`), with those of Mamba-2 (`ssd`) in brackets.
    """

    y: Tensor
    """Read-outs, b l E [b l H P], in the dtype of x."""
    h_last: Tensor
    """State after the last position, b E N [b H P N], float32 (float64 if x is float64)."""
    states: Tensor | None
    """States right after the positions of `states_at`, b S E N [b S H P N]; None if none were asked for."""


class DeltaScanOut(NamedTuple):
    """What `delta_scan` returns."""

    y: Tensor
    """Read-outs S_t r_t, b l H V, in the dtype of v."""
    h_last: Tensor
    """State after the last position, b H V K, float32 (float64 if v is float64)."""
    states: Tensor | None
    """States right after the positions of `states_at`, b S H V K; None if none were asked for."""
    recall: Tensor
    """S_{t-1} a_t, what the state held under the address a_t before position t wrote: b l H V, in the dtype of v."""


class StateEdits(NamedTuple):
    """Edits of the state: right after position `at[i]`, h <- scale[:, i] * h + add[:, i].

    The read-out at that position and all later ones see the edited state, and so do `states` and `h_last`.
    """

    at: Sequence[int]
    """Positions, strictly ascending."""
    scale: Tensor | None = None
    """b S E N [b S H P N; b S H V K], or anything that broadcasts to it; None means 1."""
    add: Tensor | None = None
    """b S E N [b S H P N; b S H V K], or anything that broadcasts to it; None means 0."""
