"""The held scan of Mamba-3: a value enters the state at its own position and, decayed, at the next.

    h_t = alpha_t h_{t-1} + beta_t x_{t-1} B_{t-1}^T + gamma_t x_t B_t^T          y_t = h_t C_t + skip_t x_t

With onward_s = beta_{s+1} / alpha_{s+1}, what x_s will be written with at the next position, before its decay,

    g_t = h_t + onward_t x_t B_t^T      g_t = alpha_t g_{t-1} + (gamma_t + onward_t) x_t B_t^T      one scan of Mamba-2

    alpha[t, s] = (gamma_s + onward_s) alpha_{s+1} ... alpha_t C_t . B_s,  s < t
    alpha[t, t] = gamma_t C_t . B_t + skip_t

With several inputs and outputs of a head (MIMO) a channel's value is written along sum_r up_r B_r and read along
sum_r down_r C_r, numbers of its own: each channel is then a lane, and the ranks r are summed by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.frozen.scan import HeldScan, resolve_queries, states_before
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.precision import state_dtype

LANES_AT_ONCE = 2**22
"""Numbers of rows that a mean over lanes has at once."""


@dataclass(frozen=True)
class TrapezoidScan(HeldScan):
    """What the scan of Mamba-3 reads; H heads of P channels. Its state before the first position is b H P 2N: h, and
    x B^T of the position before, which is still to be written."""

    u: Float[Tensor, "b l lanes width"]
    """Values x: a lane is a head, or with several ranks a channel."""
    step: Float[Tensor, "b l H"]
    """-ln alpha; 0 at padding."""
    beta: Float[Tensor, "b l H"]
    gamma: Float[Tensor, "b l H"]
    B: Float[Tensor, "b l R H N"]
    C: Float[Tensor, "b l R H N"]
    beside: Float[Tensor, "b l lanes"]
    """What a value adds to its own y beside the state."""
    up: Float[Tensor, "R H P"] | None = None
    """Factors of x in each rank's write; None of one rank: 1."""
    down: Float[Tensor, "b l R H P"] | None = None
    """Factors of each rank's y in the sum; None of one rank: 1."""

    # Over other values ---------------------------------------------------------------------------------------------

    def over(self, u: Float[Tensor, "n l lanes width"], rows: Any = None) -> TrapezoidScan:
        if rows is None:
            return replace(self, u=u)
        names = ("step", "beta", "gamma", "B", "C", "beside")
        held: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return replace(self, u=u, **held, down=None if self.down is None else self.down[rows])

    def out(
        self,
        h0: Float[Tensor, "b ..."] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        x = self.u.to(state_dtype(self.u)).unflatten(2, (self.n_heads, -1)).flatten(3)  # b l H P
        writes = x.unsqueeze(2) if self.up is None else x.unsqueeze(2) * self.up  # b l R H P
        onward = self.onward
        g0, last = None, None
        if h0 is not None:
            h, last = h0.reshape(*x.shape[:1], *x.shape[2:], 2, -1).unbind(-2)
            g0 = h + self.entering[..., None, None] * last
        at = [] if states_at is None else list(states_at)
        edited = [] if edits is None else list(edits.at)
        pending = {t: onward[:, t, :, None, None] * self.written(writes, t) for t in {*at, *edited}}
        y, g, states = self._scan(writes, g0, at, _of_sums(edits, pending), frozen)
        beside = (self.beside.unsqueeze(-1) * self.u).reshape(x.shape)
        y = y - onward.unsqueeze(-1) * self.self_read(writes) + beside
        end, real = self.last_real  # nothing is pending there: onward is 0
        ends = self.written(writes, end)
        if last is not None:
            ends = torch.where(real[:, None, None, None], ends, last.to(ends.dtype))
        kept = None
        if states_at is not None:
            kept = torch.stack([states[:, i] - pending[t] for i, t in enumerate(at)], 1)
        return ScanOut(y.reshape(self.u.shape).to(self.u.dtype), torch.cat([g, ends], -1), kept)

    def _scan(
        self, writes: Tensor, g0: Tensor | None, at: list[int], edits: StateEdits | None, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(y of all ranks summed, the last g, the chosen ones), by one scan of Mamba-2 for each rank's C.

        The ranks' writes are scanned side by side, as heads whose states are then summed.
        """
        R, H = writes.shape[2:4]
        share = torch.where(self.step > 0, (self.gamma + self.onward) / self.step, 0)
        values = (share[:, :, None, :, None] * writes).flatten(2, 3)
        step, A = self.step.repeat(1, 1, R), -torch.ones_like(self.step[0, 0]).repeat(R)
        B = self.B.flatten(2, 3).to(values.dtype)
        first = None if g0 is None else torch.cat([g0, *[torch.zeros_like(g0)] * (R - 1)], 1)
        if edits is not None and R > 1:
            edits = _on_the_first(edits, R, H, writes.new_zeros(1, 1, H, 1, 1))
        total, last, states = torch.zeros_like(writes[:, :, 0]), None, None
        for r in range(R):
            C = self.C[:, :, r].repeat(1, 1, R, 1).to(values.dtype)
            found = ops.ssd(values, step, A, B, C, h0=first, states_at=at or None, edits=edits, frozen=frozen)
            y = found.y.unflatten(2, (R, H)).sum(2)
            total = total + (y if self.down is None else y * self.down[:, :, r])
            last, states = found.h_last, found.states
        assert last is not None  # there is a rank
        last = last.unflatten(1, (R, H)).sum(1)
        return total, last, last if states is None else states.unflatten(2, (R, H)).sum(2)

    def written(self, writes: Float[Tensor, "b l R H P"], t: int | Tensor) -> Float[Tensor, "b H P N"]:
        """x B^T of a position (or of one for each row), without its factors."""
        row = slice(None) if isinstance(t, int) else torch.arange(len(writes), device=writes.device)
        return torch.einsum("brhp,brhn->bhpn", writes[row, t], self.B[row, t].to(writes.dtype))

    def self_read(self, writes: Float[Tensor, "b l R H P"]) -> Float[Tensor, "b l H P"]:
        """C x B^T of each position, without its factors."""
        own = torch.einsum("blrhn,blshn->blrsh", self.C, self.B).to(writes.dtype)  # read with r, written with s
        found = torch.einsum("blrsh,blshp->blrhp", own, writes)
        return (found if self.down is None else found * self.down).sum(2)

    # Positions next to each other ------------------------------------------------------------------------------------

    @property
    def n_heads(self) -> int:
        """Heads H."""
        return self.step.shape[2]

    @property
    def real(self) -> Bool[Tensor, "b l"]:
        """Positions that are no padding."""
        return (self.step > 0).any(-1)

    @property
    def last_real(self) -> tuple[Tensor, Tensor]:
        """(the last position of each row that is no padding, whether there is one)."""
        columns = torch.arange(self.length, device=self.step.device)
        return torch.where(self.real, columns, 0).max(1).values, self.real.any(1)

    @property
    def before_decay(self) -> Float[Tensor, "b l H"]:
        """beta / alpha: with what the position before is written here, before this position's decay."""
        return self.beta * torch.exp(self.step)

    @property
    def entering(self) -> Float[Tensor, "b H"]:
        """The same of the first real position, by which what is before this call is written."""
        first = self.real.long().argmax(1)
        return self.before_decay[torch.arange(len(first), device=first.device), first]

    @property
    def onward(self) -> Float[Tensor, "b l H"]:
        """The same of the next real position; 0 of the last one, and of padding."""
        l, real = self.length, self.real
        columns = torch.where(real, torch.arange(l, device=real.device), l)
        following = columns.flip(1).cummin(1).values.flip(1)  # the next real one, from here on
        following = torch.cat([following[:, 1:], torch.full_like(following[:, :1], l)], 1)
        padded = torch.cat([self.before_decay, torch.zeros_like(self.beta[:, :1])], 1)
        found = padded.gather(1, following.unsqueeze(-1).expand(-1, -1, self.n_heads))
        return found * real.unsqueeze(-1)

    # Its matrix ------------------------------------------------------------------------------------------------------

    def of_lanes(self, lanes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(the head of each lane, what it is written along, what it is read along; b l lanes N)."""
        at = torch.tensor(lanes, dtype=torch.long, device=self.step.device)
        if self.up is None or self.down is None:
            return at, self.B[:, :, 0, at], self.C[:, :, 0, at]
        P = self.up.shape[2]
        head, channel = at // P, at % P
        B = (self.B[:, :, :, head] * self.up[:, head, channel].unsqueeze(-1)).sum(2)
        return head, B, (self.C[:, :, :, head] * self.down[:, :, :, head, channel].unsqueeze(-1)).sum(2)

    def rows(
        self,
        queries: Sequence[int] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b H q l"]:
        chosen = self.lane_numbers(slice(None) if lanes is None else lanes)
        head, B, C = self.of_lanes(chosen)
        step, share = self.step[..., head], (self.gamma + self.onward)[..., head]
        none = step.new_zeros(len(chosen))
        rate = -torch.ones_like(none)[:, None]
        scan = SelectiveScan(self.u[:, :, chosen], step, rate, share.unsqueeze(-1) * B, C, none)
        found = scan.rows(queries, include_skip=False, include_dt=False)
        at = resolve_queries(queries, self.length)
        own = self._own(head, B, C) + self.beside[:, :, chosen] * include_skip
        found[:, :, torch.arange(len(at), device=found.device), at] = own[:, at].transpose(1, 2).to(found.dtype)
        return found

    def mean_rows(
        self,
        queries: Sequence[int] | None = None,
        weights: Float[Tensor, " H"] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b q l"]:
        chosen = self.lane_numbers(slice(None) if lanes is None else lanes)
        weights = self.values.new_full((len(chosen),), 1 / len(chosen)) if weights is None else weights
        at_once = max(1, LANES_AT_ONCE // (self.batch * len(resolve_queries(queries, self.length)) * self.length))
        total: Tensor | float = 0.0
        for first in range(0, len(chosen), at_once):
            some = slice(first, first + at_once)
            rows = self.rows(queries, lanes=chosen[some], include_skip=include_skip)
            total = total + torch.einsum("bhql,h->bql", rows, weights[some].to(rows.dtype))
        assert isinstance(total, Tensor)  # there is a lane
        return total

    def diagonal(self, *, include_skip: bool = True) -> Float[Tensor, "b l lanes"]:
        own = self._own(*self.of_lanes(list(range(self.n_lanes))))
        return own + self.beside if include_skip else own

    def _own(self, head: Tensor, B: Tensor, C: Tensor) -> Float[Tensor, "b l lanes"]:
        return self.gamma[..., head] * (B * C).sum(-1)

    def switched_off(
        self, head: int, vy: Float[Tensor, "b l E"], h0: Tensor | None
    ) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b l"], Float[Tensor, "b l"]]:
        """A write is both of its halves. Without a decay beta stays as it was."""
        if not -self.n_heads <= head < self.n_heads:
            raise IndexError(f"head {head} is out of range: this mixer has {self.n_heads} heads")
        S = self.out(h0, states_at=range(self.length)).states
        assert S is not None  # they were asked for
        start = None if h0 is None else h0.reshape(*S[:, 0].shape[:-1], 2, -1)[:, head, :, 0]
        S = states_before(S[:, :, head], start)
        # The same run from the end, over one head: Lam_t = vy_t C_t^T + alpha_{t+1} Lam_{t+1}.
        down = 1 if self.down is None else self.down[:, :, :, head]
        seen = vy.unflatten(2, (self.n_heads, -1))[:, :, head].unsqueeze(2) * down
        at_y = torch.einsum("blrp,blrn->blpn", seen.expand(-1, -1, self.C.shape[2], -1), self.C[:, :, :, head])
        alpha = torch.exp(-self.step[..., head])
        later = torch.cat([alpha[:, 1:], torch.ones_like(alpha[:, :1])], 1).flip(1)
        Lam = ops.linear_scan(later[..., None, None], at_y.flip(1)).flip(1)
        x = self.u.unflatten(2, (self.n_heads, -1)).flatten(3)
        writes = x.unsqueeze(2) if self.up is None else x.unsqueeze(2) * self.up
        xB = torch.einsum("blrp,blrn->blpn", writes[:, :, :, head], self.B[:, :, :, head])
        # The second half is read from the next position on: Lam_t without what t itself reads.
        halves = self.gamma[..., head, None, None] * Lam + self.onward[..., head, None, None] * (Lam - at_y)
        write = -(xB * halves).sum((-2, -1))
        decay = (S * (1 - alpha)[..., None, None] * Lam).sum((-2, -1))
        return write, torch.zeros_like(write), decay

    def skip(self) -> Float[Tensor, "b l lanes"]:
        return self.beside

    def transport(self, source: int) -> Float[Tensor, "b l lanes 1"]:
        """As a part of the whole write, of which a first part enters at the source, the rest at the next position."""
        head = self.of_lanes(list(range(self.n_lanes)))[0]
        steps = self.step.double().cumsum(1)
        left = torch.exp(-(steps - steps[:, source : source + 1]).clamp(min=0)).to(self.step.dtype)
        whole = (self.gamma + self.onward)[:, source]
        left[:, source] = torch.where(whole > 0, self.gamma[:, source] / whole, 0)
        left[:, :source] = 0
        return left[..., head].unsqueeze(-1)


def _of_sums(edits: StateEdits | None, pending: dict[int, Tensor]) -> StateEdits | None:
    """Edits of h as those of g = h + pending: g' = scale g + (1 - scale) pending + add."""
    if edits is None:
        return None
    held = torch.stack([pending[t] for t in edits.at], 1)
    if edits.scale is None:
        return edits
    rest = (1 - edits.scale) * held
    return StateEdits(edits.at, edits.scale, rest if edits.add is None else rest + edits.add)


def _on_the_first(edits: StateEdits, R: int, H: int, none: Tensor) -> StateEdits:
    """Edits of a sum of R states: every summand is scaled, the first is added to."""
    scale, add = edits.scale, edits.add
    if scale is not None:
        scale = scale.expand(*scale.shape[:2], H, *scale.shape[3:]).repeat(1, 1, R, 1, 1)
    if add is not None:
        add = add.expand(*add.shape[:2], H, *add.shape[3:])
        add = torch.cat([add, *[none.to(add.dtype).expand_as(add)] * (R - 1)], 2)
    return StateEdits(edits.at, scale, add)
