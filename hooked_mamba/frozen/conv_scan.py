"""A convolution as a held scan: its taps are the matrix, its last inputs the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mamba.frozen.linear import causal_mix
from hooked_mamba.frozen.scan import HeldScan, resolve_queries
from hooked_mamba.ops.interface import ScanOut, StateEdits


@dataclass(frozen=True)
class ConvScan(HeldScan):
    """y_t = sum_k taps[K-1-k] u_{t-k}, each channel a lane; the state is the K - 1 inputs before, b K-1 E."""

    u: Float[Tensor, "b l E 1"]
    taps: Float[Tensor, "E K"]
    real: Bool[Tensor, "b l"]
    """Columns that are no padding: the next state is made of the last of these."""

    def over(self, u: Float[Tensor, "n l E 1"], rows: Any = None) -> ConvScan:
        return replace(self, u=u, taps=self.taps.to(u.dtype), real=self.real if rows is None else self.real[rows])

    def out(
        self,
        h0: Float[Tensor, "b k E"] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        """As in :class:`HeldScan`.

        Raises
        ------
        ValueError
            States or edits of them are asked for.
        """
        if states_at is not None or edits is not None:
            raise ValueError("a convolution has no state that could be read or edited: its memory is its last inputs")
        u, before = self.u[..., 0], self.taps.shape[1] - 1
        past = u.new_zeros(len(u), before, u.shape[2]) if h0 is None else h0.to(u.dtype)
        whole = torch.cat([past, u], 1)
        y = causal_mix(self.taps.detach() if frozen else self.taps, whole)[:, before:]
        ends = (self.real * torch.arange(1, self.length + 1, device=u.device)).amax(1)
        last = ends[:, None] + torch.arange(before, device=u.device)
        return ScanOut(y.unsqueeze(-1), whole.gather(1, last.unsqueeze(-1).expand(-1, -1, u.shape[2])), None)

    def rows(
        self,
        queries: Sequence[int] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b E q l"]:
        targets = torch.tensor(resolve_queries(queries, self.length), device=self.u.device)
        lag = targets[:, None] - torch.arange(self.length, device=self.u.device)
        K = self.taps.shape[1]
        taps = self.taps if lanes is None else self.taps[self.lane_numbers(lanes)]
        reach = taps[:, (K - 1 - lag).clamp(0, K - 1)] * ((lag >= 0) & (lag < K))
        return reach.expand(self.batch, -1, -1, -1)
