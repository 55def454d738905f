"""One view of the scans of both families, and the attention matrix that is hidden in them.

A *lane* is what has one step size: a channel in Mamba-1 (H = E lanes of P = 1), a head in Mamba-2. In every lane

    y_t = sum_{s<=t} alpha[t,s] u_s        alpha[t,s] = C_t (prod_{j=s+1..t} A_bar_j) B_bar_s + (t==s) D

(Ali, Zimerman & Wolf 2024, arXiv:2403.01590; Dao & Gu 2024, section 3). The product starts at s+1, and only the
value u_s is a factor of its own: dt, B and C are as they were.

How rows are made: for a position m between s and t the product splits into exp(A (cs_t - cs_m)) and
exp(A (cs_m - cs_s)), cs the running sum of dt. Both are at most 1, so nothing overflows, and a whole block
(targets after m) x (sources up to m) is one matrix product over N. Halving the sequence again and again covers all
pairs s < t with l log2(l) exponentials a state instead of l^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.ops.interface import ScanOut, StateEdits


@dataclass(frozen=True)
class ScanView:
    """What a scan reads, in one layout for both families."""

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
    def n_lanes(self) -> int:
        """Lanes H."""
        return self.dt.shape[-1]

    @property
    def length(self) -> int:
        """Positions l."""
        return self.dt.shape[1]

    def lanes(self, index: Sequence[int] | slice) -> ScanView:
        """Only these lanes. B and C are repeated so that every lane is a group of its own."""
        per_group = self.n_lanes // self.B.shape[2]
        chosen = range(self.n_lanes)[index] if isinstance(index, slice) else [int(i) for i in index]
        for i in chosen:
            if not -self.n_lanes <= i < self.n_lanes:
                raise IndexError(f"lane {i} is out of range: this mixer has {self.n_lanes} channels or heads")
        at = torch.tensor([i % self.n_lanes for i in chosen], dtype=torch.long, device=self.dt.device)
        shared = self.B.shape[2] == 1
        B, C = (self.B, self.C) if shared else (self.B[:, :, at // per_group], self.C[:, :, at // per_group])
        return ScanView(self.u[:, :, at], self.dt[..., at], self.A[at], B, C, self.D[at])

    def state(self, n: int) -> ScanView:
        """Only state n of every lane (Mamba-1): the scan is the sum of these."""
        return replace(self, A=self.A[:, n : n + 1], B=self.B[..., n : n + 1], C=self.C[..., n : n + 1])

    def with_input(self, u: Float[Tensor, "b l H P"]) -> ScanView:
        """The same scan over another input: since dt, B and C stay, this is linear in u."""
        return replace(self, u=u)


def hidden_attention(
    view: ScanView,
    queries: Sequence[int] | None = None,
    *,
    include_dt: bool = True,
    include_skip: bool = True,
) -> Float[Tensor, "b H q l"]:
    """Rows of the hidden attention of every lane: what position `query` reads from every source.

    Parameters
    ----------
    view
        The scan; choose lanes by :meth:`ScanView.lanes` first.
    queries
        Target positions, in any order; negative ones count from the end. None: all.
    include_dt
        Whether the factor dt_s of the write is part of the weight.
    include_skip
        Whether D stands on the diagonal.

    Returns
    -------
    Tensor
        b H q l, in the dtype of dt; 0 where the source comes after the target.
    """
    targets = resolve_queries(queries, view.length)
    order = sorted(range(len(targets)), key=targets.__getitem__)
    ascending = [targets[i] for i in order]
    b, l, H = view.dt.shape
    out = view.dt.new_zeros(b, H, len(targets), l)
    for block in blocks_of(ascending, l):
        left, right = block_factors(view, block, ascending, include_dt)
        out[:, :, block.rows, block.sources] = left.transpose(1, 2) @ right.permute(0, 2, 3, 1)
    rows = torch.arange(len(targets), device=out.device)
    at = torch.tensor(ascending, dtype=torch.long, device=out.device)
    out[:, :, rows, at] = diagonal(view, at, include_dt, include_skip).transpose(1, 2)
    if order != list(range(len(order))):
        out = out[:, :, torch.tensor(order, device=out.device).argsort()]
    return out


def mean_hidden_attention(
    view: ScanView,
    queries: Sequence[int] | None = None,
    weights: Float[Tensor, " H"] | None = None,
    *,
    include_dt: bool = True,
    include_skip: bool = True,
    lanes_at_once: int | None = None,
) -> Float[Tensor, "b q l"]:
    """The weighted sum of all lanes' rows (default: their mean), with no l x l matrix per lane.

    Lanes and states together are the inner axis of one matrix product a block; by default so many lanes at once that
    the factors of a block stay within a few times 16 MiB.
    """
    targets = resolve_queries(queries, view.length)
    order = sorted(range(len(targets)), key=targets.__getitem__)
    ascending = [targets[i] for i in order]
    b, l, H = view.dt.shape
    if weights is None:
        weights = view.dt.new_full((H,), 1 / H)
    if lanes_at_once is None:
        lanes_at_once = max(1, 2**22 // (b * l * view.B.shape[-1]))
    out = view.dt.new_zeros(b, len(targets), l)
    at = torch.tensor(ascending, dtype=torch.long, device=out.device)
    rows = torch.arange(len(targets), device=out.device)
    for first in range(0, H, lanes_at_once):
        part = view.lanes(slice(first, first + lanes_at_once))
        w = weights[first : first + lanes_at_once]
        for block in blocks_of(ascending, l):
            left, right = block_factors(part, block, ascending, include_dt)
            left = left * w[:, None]
            out[:, block.rows, block.sources] += left.flatten(2) @ right.flatten(2).transpose(1, 2)
        out[:, rows, at] += diagonal(part, at, include_dt, include_skip) @ w
    if order != list(range(len(order))):
        out = out[:, torch.tensor(order, device=out.device).argsort()]
    return out


def resolve_queries(queries: Sequence[int] | None, length: int) -> list[int]:
    """Target positions as non-negative ints."""
    if queries is None:
        return list(range(length))
    for t in queries:
        if not -length <= t < length:
            raise IndexError(f"query {t} is out of range for {length} positions")
    return [int(t) % length for t in queries]


@dataclass(frozen=True)
class Block:
    """Targets after `middle` times sources up to it."""

    rows: slice
    """Places in the ascending list of targets."""
    sources: slice
    middle: int
    """The last source; the decay is split behind it."""


def blocks_of(ascending: Sequence[int], length: int) -> Iterator[Block]:
    """Blocks that cover every pair (target, earlier source) once: halve, take the off-diagonal half, go on."""
    todo = [(0, length, 0, len(ascending))]
    while todo:
        start, stop, first, last = todo.pop()
        if stop - start < 2 or first == last:
            continue
        half = (start + stop + 1) // 2
        cut = first
        while cut < last and ascending[cut] < half:
            cut += 1
        if cut < last:
            yield Block(slice(cut, last), slice(start, half), half - 1)
        todo += [(start, half, first, cut), (half, stop, cut, last)]


def block_factors(
    view: ScanView, block: Block, ascending: Sequence[int], include_dt: bool
) -> tuple[Float[Tensor, "b q H N"], Float[Tensor, "b s H N"]]:
    """C exp(A (cs_t - cs_m)) of the targets, and B_bar exp(A (cs_m - cs_s)) of the sources."""
    start, stop = block.sources.start, block.sources.stop
    last = ascending[block.rows.stop - 1]
    # Running sums in float64: exponents are differences of numbers that grow with the length.
    steps = view.dt[:, start : last + 1].double().cumsum(1)
    middle = steps[:, stop - 1 - start, None]
    at = torch.tensor(ascending[block.rows], dtype=torch.long, device=view.dt.device)
    since = (steps[:, at - start] - middle).to(view.dt.dtype)
    until = (middle - steps[:, : stop - start]).to(view.dt.dtype)
    left = torch.exp(since.unsqueeze(-1) * view.A) * _of_lanes(view.C[:, at], view)
    right = torch.exp(until.unsqueeze(-1) * view.A) * _of_lanes(view.B[:, start:stop], view)
    if include_dt:
        right = right * view.dt[:, start:stop].unsqueeze(-1)
    return left, right


def diagonal(view: ScanView, at: Tensor, include_dt: bool, include_skip: bool) -> Float[Tensor, "b q H"]:
    """alpha[t,t]."""
    own = (_of_lanes(view.B[:, at], view) * _of_lanes(view.C[:, at], view)).sum(-1)
    if include_dt:
        own = own * view.dt[:, at]
    return own + view.D if include_skip else own.expand(-1, -1, view.n_lanes)


def _of_lanes(v: Tensor, view: ScanView) -> Tensor:
    """b l G N as b l H N (or b l 1 N where all lanes share it), in the dtype of dt."""
    G = v.shape[2]
    v = v.to(view.dt.dtype)
    return v if G in (1, view.n_lanes) else v.repeat_interleave(view.n_lanes // G, 2)


def run_scan(
    view: ScanView, h0: Float[Tensor, "b ..."] | None = None, *, frozen: bool = False
) -> Float[Tensor, "b l H P"]:
    """y_t = C h_t + D u_t over the view's own input, in linear time.

    Parameters
    ----------
    h0
        The state before the first position, b E N (Mamba-2: b H P N); None: an empty one.
    frozen
        Whether gradients flow to u and h0 alone.
    """
    return scan_out(view, h0, frozen=frozen).y


def scan_out(
    view: ScanView,
    h0: Float[Tensor, "b ..."] | None = None,
    *,
    states_at: Sequence[int] | None = None,
    edits: StateEdits | None = None,
    frozen: bool = False,
) -> ScanOut:
    """The same with its states, b H P N (and b S H P N) in both families; so are the scales and additions of edits."""
    if h0 is not None:
        h0 = h0.reshape(*view.u.shape[:1], *view.u.shape[2:], -1)
    if view.A.shape[1] == 1:
        A, B, C = view.A[:, 0], view.B, view.C
        return ops.ssd(view.u, view.dt, A, B, C, view.D, h0=h0, states_at=states_at, edits=edits, frozen=frozen)
    if edits is not None:
        scale, add = (None if part is None else part[:, :, :, 0] for part in edits[1:])
        edits = StateEdits(edits.at, scale, add)
    h0 = None if h0 is None else h0[:, :, 0]
    u, B, C = view.u[..., 0], view.B[:, :, 0], view.C[:, :, 0]
    out = ops.selective_scan(u, view.dt, view.A, B, C, view.D, h0=h0, states_at=states_at, edits=edits, frozen=frozen)
    states = None if out.states is None else out.states.unsqueeze(3)
    return ScanOut(out.y.unsqueeze(-1), out.h_last.unsqueeze(2), states)
