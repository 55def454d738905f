"""What every held scan answers: with all but the value held, its output is a matrix times its input, lane by lane.

    y_t = sum_{s<=t} alpha[t,s] u_s + (what the state before the first position sends)

A *lane* is what has an alpha of its own: a channel in Mamba-1, a head in Mamba-2, in attention and in the delta rule.
Its P values all move alike. Attention's alpha is its pattern, and its state is empty.

A new kind gives :meth:`HeldScan.over` and :meth:`HeldScan.out`; everything else follows from them, by the adjoint, and
may be overridden by what is faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.precision import state_dtype


class HeldScan(ABC):
    """Values moving between positions, with everything that decides how held at a run's numbers."""

    u: Float[Tensor, "b l H P"]
    """The values, as the run had them."""

    # What a kind must say --------------------------------------------------------------------------------------

    @abstractmethod
    def over(self, u: Float[Tensor, "n l H P"], rows: Any = None) -> HeldScan:
        """The same scan over other values: it is linear in them. `rows`: of these rows of the run; None: of all."""

    @abstractmethod
    def out(
        self,
        h0: Float[Tensor, "b ..."] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        """Outputs b l H P, the last state b H P N and chosen states b S H P N, in linear time.

        Parameters
        ----------
        h0
            The state before the first position, in any shape that flattens to b H P N; None: an empty one.
        states_at
            Ascending positions.
        edits
            Of the state on the way; scales and additions b S H P N.
        frozen
            Whether gradients flow to u and h0 alone.
        """

    # What follows ----------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows b."""
        return self.u.shape[0]

    @property
    def length(self) -> int:
        """Positions l."""
        return self.u.shape[1]

    @property
    def n_lanes(self) -> int:
        """Lanes H."""
        return self.u.shape[2]

    @property
    def width(self) -> int:
        """Values P of a lane."""
        return self.u.shape[3]

    @property
    def values(self) -> Float[Tensor, "b l E"]:
        """u with its lanes side by side, float32 at least."""
        u = self.u.flatten(2)
        return u.float() if u.dtype in (torch.bfloat16, torch.float16) else u

    @property
    def dtype(self) -> torch.dtype:
        """What rows are computed in."""
        return self.values.dtype

    def of(self, rows: Any) -> HeldScan:
        """The scan of some rows of the run."""
        return self.over(self.u[rows], rows)

    def pull(
        self, v: Float[Tensor, "n l E"], h0: Tensor | None = None, rows: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Covectors on y as covectors on u, and on h0 (None without one): the adjoint, by one reverse scan.

        `rows`: the row of the run that each belongs to, and its state h0; None: all of them.
        """
        here = self if rows is None else self.of(rows)
        with torch.enable_grad():
            u = here.values.detach().requires_grad_()
            inputs = [u] if h0 is None else [u, h0.detach().requires_grad_()]
            y = here.over(u.reshape(here.u.shape)).out(*inputs[1:], frozen=True).y.flatten(2)
            found = torch.autograd.grad(y, inputs, v.to(y.dtype))
        return found[0], found[1] if len(found) > 1 else None

    def rows(
        self,
        queries: Sequence[int] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b H q l"]:
        """Rows of the attention matrix that is hidden in the scan: what position `query` reads from every source.

        Parameters
        ----------
        queries
            Target positions, in any order; negative ones count from the end. None: all.
        lanes
            Which lanes; None: all.
        include_skip
            Whether what passes beside the state stands on the diagonal.
        """
        targets = resolve_queries(queries, self.length)
        b, l, H, P = self.u.shape
        row = torch.arange(b, device=self.u.device).repeat_interleave(len(targets))
        at = torch.tensor(targets, dtype=torch.long, device=self.u.device)
        v = self.values.new_zeros(len(row), l, H, P)
        v[torch.arange(len(row), device=v.device), at.repeat(b), :, 0] = 1
        back = self.of(row).pull(v.flatten(2))[0].reshape(b, len(targets), l, H, P)[..., 0]
        out = back.permute(0, 3, 1, 2)
        if not include_skip:
            out = out.clone()
            out[:, :, torch.arange(len(targets), device=v.device), at] -= self._skip_at(targets).to(out.dtype)
        return out if lanes is None else out[:, self.lane_numbers(lanes)]

    def _skip_at(self, targets: list[int]) -> Float[Tensor, "*b H q"]:
        skip = self.skip()
        return skip[:, None] if skip.ndim == 1 else skip[:, targets].transpose(1, 2)

    def mean_rows(
        self,
        queries: Sequence[int] | None = None,
        weights: Float[Tensor, " H"] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b q l"]:
        """The weighted sum of the lanes' rows; default: their mean."""
        rows = self.rows(queries, lanes=lanes, include_skip=include_skip)
        return rows.mean(1) if weights is None else torch.einsum("bhql,h->bql", rows, weights)

    def diagonal(self, *, include_skip: bool = True) -> Float[Tensor, "b l H"]:
        """alpha[t,t]."""
        return self.rows(include_skip=include_skip).diagonal(dim1=2, dim2=3).transpose(1, 2)

    def skip(self) -> Float[Tensor, "*positions H"]:
        """The part of alpha[t,t] that passes beside the state: one number a lane, or b l H where it depends on t."""
        return self.values.new_zeros(self.n_lanes)

    def write(self, u: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l H P N"]:
        """What values add to the state at their positions.

        Raises
        ------
        ValueError
            This kind has no state that is written to.
        """
        raise ValueError(f"{type(self).__name__} has no state that values are written to")

    def transport(self, source: int) -> Float[Tensor, "b l H N"]:
        """What part of the write at `source` is left after each position; 0 before it.

        Raises
        ------
        ValueError
            This kind does not say.
        """
        raise ValueError(f"{type(self).__name__} does not define what is left of a write")

    def switched_off(
        self, head: int, vy: Float[Tensor, "b l E"], h0: Tensor | None
    ) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b l"], Float[Tensor, "b l"]]:
        """What sum_t vy_t . y_t changes by when each single write, removal or decay of a head is switched off.

        Raises
        ------
        NotImplementedError
            This kind does not say.
        """
        raise NotImplementedError(type(self).__name__)

    def lane_numbers(self, lanes: Sequence[int] | slice) -> list[int]:
        """Lanes as non-negative numbers.

        Raises
        ------
        IndexError
            A lane that does not exist.
        """
        n = self.n_lanes
        chosen = range(n)[lanes] if isinstance(lanes, slice) else [int(i) for i in lanes]
        for i in chosen:
            if not -n <= i < n:
                raise IndexError(f"lane {i} is out of range: this mixer has {n} channels or heads")
        return [i % n for i in chosen]


@dataclass(frozen=True)
class DecayScan(HeldScan):
    """h_t = a_t h_{t-1} + u_t, y_t = h_t: the plainest recurrence, each lane with a decay of its own."""

    u: Float[Tensor, "b l H P"]
    a: Float[Tensor, "b l H"]
    """Decay; 1 at padding, where u is 0."""

    def over(self, u: Float[Tensor, "n l H P"], rows: Any = None) -> DecayScan:
        return DecayScan(u, self.a if rows is None else self.a[rows])

    def out(
        self,
        h0: Float[Tensor, "b ..."] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        dtype = state_dtype(self.u)
        a, u = (self.a.detach() if frozen else self.a).to(dtype), self.u.to(dtype)
        h = None if h0 is None else h0.reshape(u[:, 0].shape).to(dtype)
        scale, add = (None, None) if edits is None else edits[1:]
        pieces, start = [], 0
        for end in sorted({*([] if edits is None else edits.at), self.length - 1}):
            piece = ops.linear_scan(a[:, start : end + 1].unsqueeze(-1), u[:, start : end + 1], h0=h)
            if edits is not None and end in edits.at:
                i, h = list(edits.at).index(end), piece[:, -1]
                h = h if scale is None else h * scale[:, i, ..., 0].to(h.dtype)
                h = h if add is None else h + add[:, i, ..., 0].to(h.dtype)
                piece = torch.cat([piece[:, :-1], h.expand_as(piece[:, -1]).unsqueeze(1)], 1)
            pieces.append(piece)
            h, start = piece[:, -1], end + 1
        y = torch.cat(pieces, 1)
        return ScanOut(
            y.to(self.u.dtype), y[:, -1, ..., None], None if states_at is None else y[:, states_at, ..., None]
        )

    def write(self, u: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l H P N"]:
        return u.unsqueeze(-1)

    def transport(self, source: int) -> Float[Tensor, "b l H N"]:
        passed = torch.cat([torch.ones_like(self.a[:, :1]), self.a[:, source + 1 :].cumprod(1)], 1)
        return torch.cat([torch.zeros_like(self.a[:, :source]), passed], 1).unsqueeze(-1)


def resolve_queries(queries: Sequence[int] | None, length: int) -> list[int]:
    """Target positions as non-negative ints."""
    if queries is None:
        return list(range(length))
    for t in queries:
        if not -length <= t < length:
            raise IndexError(f"query {t} is out of range for {length} positions")
    return [int(t) % length for t in queries]


def states_before(states: Float[Tensor, "b l ..."], h0: Tensor | None) -> Float[Tensor, "b l ..."]:
    """The state before each position, from those after each."""
    first = torch.zeros_like(states[:, 0]) if h0 is None else h0.to(states.dtype)
    return torch.cat([first.unsqueeze(1), states[:, :-1]], 1)
