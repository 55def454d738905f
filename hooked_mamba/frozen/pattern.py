"""Attention with its pattern held: the plainest of held scans, whose matrix is already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.frozen.scan import HeldScan, resolve_queries
from hooked_mamba.ops.interface import ScanOut, StateEdits


@dataclass(frozen=True)
class Pattern(HeldScan):
    """y_t = sum_s pattern[t,s] v_s; its state is the values before the first position, b m H P."""

    u: Float[Tensor, "b l H P"]
    """Values, one for each query head."""
    alpha: Float[Tensor, "b H l k"]
    """The pattern over the m values before and the l values here."""

    def over(self, u: Float[Tensor, "n l H P"], rows: Any = None) -> Pattern:
        return Pattern(u, (self.alpha if rows is None else self.alpha[rows]).to(u.dtype))

    def out(
        self,
        h0: Float[Tensor, "b m H P"] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        """As in :class:`HeldScan`; there is no state of a fixed size.

        Raises
        ------
        ValueError
            States or edits of them are asked for.
        """
        if states_at is not None or edits is not None:
            raise ValueError("attention has no state that could be read or edited: its memory is all values")
        alpha = self.alpha.detach() if frozen else self.alpha
        y = torch.einsum("bhts,bshp->bthp", alpha[..., self._earlier :], self.u)
        if h0 is not None:
            y = y + torch.einsum("bhts,bshp->bthp", alpha[..., : self._earlier], h0.to(y.dtype))
        return ScanOut(y, self.u[:, -1], None)

    def rows(
        self,
        queries: Sequence[int] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b H q l"]:
        found = self.alpha[:, :, resolve_queries(queries, self.length), self._earlier :]
        return found if lanes is None else found[:, self.lane_numbers(lanes)]

    @property
    def _earlier(self) -> int:
        """Values before the first position, m."""
        return self.alpha.shape[-1] - self.length
