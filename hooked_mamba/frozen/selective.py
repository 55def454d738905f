"""The scans of Mamba-1 and Mamba-2 in one layout, and the attention matrix that is hidden in them.

A lane is what has one step size: a channel in Mamba-1 (H = E lanes of P = 1), a head in Mamba-2. In every lane

    y_t = sum_{s<=t} alpha[t,s] u_s        alpha[t,s] = C_t (prod_{j=s+1..t} A_bar_j) B_bar_s + (t==s) D

(Ali, Zimerman & Wolf 2024, arXiv:2403.01590; Dao & Gu 2024, section 3). The product starts at s+1, and only the
value u_s is a factor of its own: dt, B and C are as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.frozen.blocks import block_factors, blocks_of, of_lanes
from hooked_mamba.frozen.scan import HeldScan, resolve_queries
from hooked_mamba.ops.interface import ScanOut, StateEdits


@dataclass(frozen=True)
class SelectiveScan(HeldScan):
    """What a scan with step sizes reads."""

    u: Float[Tensor, "b l H P"]
    """Input."""
    dt: Float[Tensor, "b l H"]
    """Step size."""
    A: Float[Tensor, "H N_or_1"]
    """Decay rates; one number a lane in Mamba-2."""
    B: Float[Tensor, "b l G N"]
    C: Float[Tensor, "b l G N"]
    D: Float[Tensor, " H"]

    @property
    def dtype(self) -> torch.dtype:
        return self.dt.dtype

    @property
    def decay_per_state(self) -> bool:
        """Whether each state of a lane has a decay of its own, as in Mamba-1."""
        return self.A.shape[1] == self.B.shape[-1]

    def over(self, u: Float[Tensor, "n l H P"], rows: Any = None) -> SelectiveScan:
        dt, B, C = (part if rows is None else part[rows] for part in (self.dt, self.B, self.C))
        return SelectiveScan(u, dt, self.A, B.to(u.dtype), C.to(u.dtype), self.D)

    def out(
        self,
        h0: Float[Tensor, "b ..."] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        if h0 is not None:
            h0 = h0.reshape(*self.u.shape[:1], *self.u.shape[2:], -1)
        if self.A.shape[1] == 1:
            A, B, C = self.A[:, 0], self.B, self.C
            return ops.ssd(self.u, self.dt, A, B, C, self.D, h0=h0, states_at=states_at, edits=edits, frozen=frozen)
        if self.B.shape[2] > 1:
            return self._by_group(h0, states_at, edits, frozen)
        if edits is not None:
            scale, add = (None if part is None else part[:, :, :, 0] for part in edits[1:])
            edits = StateEdits(edits.at, scale, add)
        h0 = None if h0 is None else h0[:, :, 0]
        u, B, C = self.u[..., 0], self.B[:, :, 0], self.C[:, :, 0]
        out = ops.selective_scan(
            u, self.dt, self.A, B, C, self.D, h0=h0, states_at=states_at, edits=edits, frozen=frozen
        )
        states = None if out.states is None else out.states.unsqueeze(3)
        return ScanOut(out.y.unsqueeze(-1), out.h_last.unsqueeze(2), states)

    def _by_group(
        self, h0: Tensor | None, states_at: Sequence[int] | None, edits: StateEdits | None, frozen: bool
    ) -> ScanOut:
        """Channels whose heads have B and C of their own, one head after the other."""
        G, outs = self.B.shape[2], []
        per_group = self.n_lanes // G
        for g in range(G):
            lanes = slice(g * per_group, (g + 1) * per_group)
            # A head's B and C, which are those of all its channels.
            B, C = self.B[:, :, g : g + 1], self.C[:, :, g : g + 1]
            mine = SelectiveScan(self.u[:, :, lanes], self.dt[..., lanes], self.A[lanes], B, C, self.D[lanes])
            here = edits
            if edits is not None:
                parts = (t if t is None or t.shape[2] == 1 else t[:, :, lanes] for t in edits[1:])
                here = StateEdits(edits.at, *parts)
            start = None if h0 is None else h0[:, lanes]
            outs.append(mine.out(start, states_at=states_at, edits=here, frozen=frozen))
        states = None if outs[0].states is None else torch.cat([out.states for out in outs], 2)  # type: ignore[misc]
        return ScanOut(torch.cat([out.y for out in outs], 2), torch.cat([out.h_last for out in outs], 1), states)

    def pull(
        self, v: Float[Tensor, "n l E"], h0: Tensor | None = None, rows: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        mamba1 = self.decay_per_state and self.width == 1 and self.B.shape[2] == 1
        if not mamba1 or isinstance(rows, tuple) or v.dtype != self.dt.dtype:
            return super().pull(v, h0, rows)
        each = torch.arange(len(self.dt), device=v.device) if rows is None else rows
        covector, at_h0 = ops.pull_scan(v, each, self.dt, self.A, self.B[:, :, 0], self.C[:, :, 0], self.D)
        return covector, None if h0 is None else at_h0.reshape(h0.shape)

    def chosen(self, lanes: Sequence[int] | slice) -> SelectiveScan:
        """Only these lanes. B and C are repeated so that every lane is a group of its own."""
        per_group = self.n_lanes // self.B.shape[2]
        at = torch.tensor(self.lane_numbers(lanes), dtype=torch.long, device=self.dt.device)
        shared = self.B.shape[2] == 1
        B, C = (self.B, self.C) if shared else (self.B[:, :, at // per_group], self.C[:, :, at // per_group])
        return SelectiveScan(self.u[:, :, at], self.dt[..., at], self.A[at], B, C, self.D[at])

    def state(self, n: int) -> SelectiveScan:
        """Only state n of every lane, where each decays by itself: the scan is the sum of these."""
        return replace(self, A=self.A[:, n : n + 1], B=self.B[..., n : n + 1], C=self.C[..., n : n + 1])

    def rows(
        self,
        queries: Sequence[int] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
        include_dt: bool = True,
    ) -> Float[Tensor, "b H q l"]:
        """Rows of the hidden attention; with `include_dt` the factor dt_s of the write is part of the weight."""
        if lanes is not None:
            return self.chosen(lanes).rows(queries, include_skip=include_skip, include_dt=include_dt)
        order, ascending = _sorted(resolve_queries(queries, self.length))
        b, l, H = self.dt.shape
        out = self.dt.new_zeros(b, H, len(ascending), l)
        for block in blocks_of(ascending, l):
            left, right = block_factors(self.dt, self.A, self.B, self.C, block, ascending, include_dt)
            out[:, :, block.rows, block.sources] = left.transpose(1, 2) @ right.permute(0, 2, 3, 1)
        rows = torch.arange(len(ascending), device=out.device)
        at = torch.tensor(ascending, dtype=torch.long, device=out.device)
        out[:, :, rows, at] = self.diagonal_at(at, include_dt, include_skip).transpose(1, 2)
        return out if order is None else out[:, :, torch.tensor(order, device=out.device).argsort()]

    def mean_rows(
        self,
        queries: Sequence[int] | None = None,
        weights: Float[Tensor, " H"] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
        lanes_at_once: int | None = None,
    ) -> Float[Tensor, "b q l"]:
        """The weighted sum of the lanes' rows (default: their mean), with no l x l matrix per lane.

        Lanes and states together are the inner axis of one matrix product a block; by default so many lanes at once
        that the factors of a block stay within a few times 16 MiB.
        """
        if lanes is not None:
            return self.chosen(lanes).mean_rows(queries, weights, include_skip=include_skip)
        order, ascending = _sorted(resolve_queries(queries, self.length))
        b, l, H = self.dt.shape
        if weights is None:
            weights = self.dt.new_full((H,), 1 / H)
        if lanes_at_once is None:
            lanes_at_once = max(1, 2**22 // (b * l * self.B.shape[-1]))
        out = self.dt.new_zeros(b, len(ascending), l)
        at = torch.tensor(ascending, dtype=torch.long, device=out.device)
        rows = torch.arange(len(ascending), device=out.device)
        for first in range(0, H, lanes_at_once):
            part = self.chosen(slice(first, first + lanes_at_once))
            w = weights[first : first + lanes_at_once]
            for block in blocks_of(ascending, l):
                left, right = block_factors(part.dt, part.A, part.B, part.C, block, ascending, True)
                left = left * w[:, None]
                out[:, block.rows, block.sources] += left.flatten(2) @ right.flatten(2).transpose(1, 2)
            out[:, rows, at] += part.diagonal_at(at, True, include_skip) @ w
        return out if order is None else out[:, torch.tensor(order, device=out.device).argsort()]

    def diagonal(self, *, include_skip: bool = True) -> Float[Tensor, "b l H"]:
        return self.diagonal_at(torch.arange(self.length, device=self.dt.device), True, include_skip)

    def diagonal_at(self, at: Tensor, include_dt: bool, include_skip: bool) -> Float[Tensor, "b q H"]:
        """alpha[t,t] of some positions."""
        H, dtype = self.n_lanes, self.dt.dtype
        own = (of_lanes(self.B[:, at], H, dtype) * of_lanes(self.C[:, at], H, dtype)).sum(-1)
        if include_dt:
            own = own * self.dt[:, at]
        return own + self.D if include_skip else own.expand(-1, -1, H)

    def skip(self) -> Float[Tensor, " H"]:
        return self.D

    def write(self, u: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l H P N"]:
        B = self.B.repeat_interleave(self.n_lanes // self.B.shape[2], 2)
        return torch.einsum("blhp,blhn->blhpn", self.dt.unsqueeze(-1) * u, B.to(self.dt.dtype))

    def transport(self, source: int) -> Float[Tensor, "b l H N"]:
        steps = self.dt.double().cumsum(1)
        passed = (steps - steps[:, source : source + 1]).clamp(min=0).to(self.dt.dtype)
        left = torch.exp(passed.unsqueeze(-1) * self.A)
        left[:, :source] = 0
        return left


def _sorted(targets: list[int]) -> tuple[list[int] | None, list[int]]:
    """(where each stood, None if they ascend already; ascending targets)."""
    order = sorted(range(len(targets)), key=targets.__getitem__)
    ascending = [targets[i] for i in order]
    return (None if order == list(range(len(order))) else order), ascending
