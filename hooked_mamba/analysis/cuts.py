"""Cuts of the value path that apply at the same time, so that a pair cut twice is not subtracted twice.

The scan is linear in u, so a cut removes a part of u: a scan cut removes the terms u_s at its cells (position,
channel), a token cut what the tokens at its cells send through the convolution's taps.

1. u is split into pieces according to which cuts remove them.
2. Each piece goes through its own scan, with the same dt, A, B, C.
3. A target t loses the scans of all pieces that some cut removes from t.

What a write cut removes never enters the state, so of its pieces only the skip D u can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_mamba.analysis.columns import Columns, column_mask
from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.frozen.tokens import Source, TokenPath
from hooked_mamba.ops.interface import StateEdits
from hooked_mamba.state import Padding

Channels = tuple[int, ...] | None
"""Channels e of E (in Mamba-2 e = h P + p); None: all."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What one `knockout` removes."""

    cells: tuple[tuple[Columns, Channels], ...]
    """Source positions, and the channels that are cut there."""
    targets: Columns
    layers: frozenset[int]
    source: Source
    cut: Literal["read", "write"]


@dataclass(frozen=True, eq=False)
class StateChange:
    """h <- scale h + add, right after a position in one layer; what was written before is scaled with it."""

    layer: int
    position: int
    """As `hook_h.{position}` counts."""
    scale: Float[Tensor, "#H #P #N"]
    add: Float[Tensor, "*b #H #P #N"] | None = None


@dataclass
class Memory:
    """What the cuts of one layer must know about earlier calls during generation."""

    p: Float[Tensor, "b k E"] | None = None
    """The convolution's last inputs, and which cuts take them away."""
    codes: Int[Tensor, "b k e"] | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    """The state that each piece has left behind."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One call of one mixer, as cuts see it."""

    view: HeldScan
    path: TokenPath
    before: int | None = None
    """Columns of earlier calls, while generating."""
    padding: Padding | None = None
    changes: StateEdits | None = None
    """What becomes of the state on the way."""
    memory: Memory = field(default_factory=Memory)

    def mask(self, columns: Columns) -> Bool[Tensor, "b l"]:
        """Columns as a mask."""
        b, l, device = self.view.batch, self.view.length, self.view.u.device
        found = column_mask(columns, b, l, self.before, device, self.padding)
        return torch.ones(b, l, dtype=torch.bool, device=device) if found is None else found

    def cells(self, cut: Cut) -> Bool[Tensor, "b l e"]:
        """Where a cut removes something; e = 1 if it does so in all channels."""
        if len(cut.cells) == 1 and cut.cells[0][1] is None:
            return self.mask(cut.cells[0][0]).unsqueeze(-1)
        cells = torch.zeros(*self.path.p.shape, dtype=torch.bool, device=self.view.u.device)
        for columns, channels in cut.cells:
            index = slice(None) if channels is None else list(channels)
            cells[:, :, index] |= self.mask(columns).unsqueeze(-1)
        return cells


_HELD: WeakKeyDictionary[nn.Module, list[Cut | StateChange]] = WeakKeyDictionary()
"""The cuts and changes of states that hold in a model now, outer ones first."""


@contextmanager
def held(model: nn.Module, *found: Cut | StateChange) -> Iterator[None]:
    """Register cuts, and changes of the states that carry them, with all cuts of the model."""
    there = _HELD.setdefault(model, [])
    there.extend(found)
    try:
        yield
    finally:
        for one in found:
            there.remove(one)


def in_force(model: nn.Module, layer: int, kind: Literal["read", "write"], before: Cut | None = None) -> list[Cut]:
    """The cuts of one kind in one layer; with `before`, those that began earlier."""
    cuts = [one for one in _HELD.get(model, []) if isinstance(one, Cut)]
    first = cuts[: cuts.index(before)] if before in cuts else cuts
    return [cut for cut in first if layer in cut.layers and cut.cut == kind]


def changes_in(
    model: nn.Module, layer: int, length: int, before: int | None, padding: Padding | None = None
) -> StateEdits | None:
    """How the states of one layer change in a call of `length` columns."""
    mine = [one for one in _HELD.get(model, []) if isinstance(one, StateChange) and one.layer == layer]
    return state_edits(mine, length, before, padding)


def state_edits(
    changes: Sequence[StateChange], length: int, before: int | None = None, padding: Padding | None = None
) -> StateEdits | None:
    """Changes of one layer in a call of `length` columns, those of one position one after the other.

    Additions are left out: they are no part of what cuts remove.

    Raises
    ------
    ValueError
        A negative position in rows that end at different columns.
    """
    end = length
    if padding is not None and any(change.position < 0 for change in changes):
        end = int(padding.ends[0])
        if bool((padding.ends != end).any()):
            raise ValueError(
                "a cut together with an edit of the state at a negative position needs rows that end at the same"
                " column: pad on the left (padding_side='left')"
            )
    scales: dict[int, Tensor] = {}
    for change in changes:
        t = change.position
        column = t + end if t < 0 else t - (before or 0)
        if 0 <= column < length:
            scales[column] = change.scale * scales[column] if column in scales else change.scale
    if not scales:
        return None
    at = sorted(scales)
    return StateEdits(at, torch.stack(torch.broadcast_tensors(*(scales[t] for t in at))).unsqueeze(0))


def pieces(cuts: Sequence[Cut], call: Pass) -> dict[int, Float[Tensor, "b l E"]]:
    """The part of u that each set of cuts removes; sets are integers whose bits index `cuts`.

    During generation, the memory of the convolution's inputs is updated.
    """
    by_token = _codes(cuts, call, "token")
    by_scan = _codes(cuts, call, "scan")
    path, memory = call.path, call.memory
    K = path.taps.shape[1]
    b, _, E = path.p.shape
    p_before = path.p.new_zeros(b, K - 1, E) if memory.p is None else memory.p
    codes_before = by_token.new_zeros(b, K - 1, by_token.shape[2]) if memory.codes is None else memory.codes
    p, codes = torch.cat([p_before, path.p], 1), torch.cat([codes_before, by_token], 1)
    parts = {code: path.sigma * path.mix(p * (codes == code))[:, K - 1 :] for code in codes.unique().tolist() if code}
    scan_codes = by_scan.unique().tolist()
    if any(scan_codes):
        parts[0] = at_least_fp32(call.view.u.flatten(2)) - sum(parts.values())
    found: dict[int, Tensor] = {}
    for token_code, part in parts.items():
        for scan_code in scan_codes:
            both = token_code | scan_code
            if both:
                here = part if len(scan_codes) == 1 else part * (by_scan == scan_code)
                found[both] = found[both] + here if both in found else here
    if call.before is not None:
        memory.p, memory.codes = _last(p, K - 1, call.padding), _last(codes, K - 1, call.padding)
    return found


def lost_reads(cuts: Sequence[Cut], call: Pass, number: int | None = None) -> Float[Tensor, "b l E"]:
    """What read cuts remove from y; with `number`, what that cut removes and none before it does.

    Parameters
    ----------
    cuts
        The cuts that apply in the layer, write cuts included.
    """
    view = call.view
    H, P = view.u.shape[2:]
    lost = torch.zeros_like(call.path.sigma)
    reads = [i for i, cut in enumerate(cuts) if cut.cut == "read" and number in (None, i)]
    earlier = [i for i, cut in enumerate(cuts[:number]) if cut.cut == "read"] if number is not None else []
    targets = {i: call.mask(cuts[i].targets) for i in {*reads, *earlier}}
    written = sum(1 << i for i, cut in enumerate(cuts) if cut.cut == "write")
    inputs = pieces(cuts, call)
    for code in {**inputs, **call.memory.states}:
        mine = [targets[i] for i in reads if code >> i & 1]
        if not mine:
            continue
        where = torch.stack(mine).any(0)
        for i in earlier:
            if code >> i & 1:
                where = where & ~targets[i]
        u = (inputs[code] if code in inputs else torch.zeros_like(lost)).unflatten(2, (H, P)).to(view.u.dtype)
        if code & written:
            y = u * view.skip().unsqueeze(-1)
        elif call.before is None and not bool(where.any()):
            continue
        else:
            out = view.over(u).out(call.memory.states.get(code), edits=call.changes)
            y = out.y
            if call.before is not None:
                call.memory.states[code] = out.h_last
        lost = torch.where(where.unsqueeze(-1), lost + y.flatten(2).to(lost.dtype), lost)
    return lost


def lost_writes(cuts: Sequence[Cut], call: Pass, number: int) -> Float[Tensor, "b l E"]:
    """The part of u that one of several write cuts removes, and none before it does."""
    lost = torch.zeros_like(call.path.sigma)
    for code, part in pieces(cuts, call).items():
        if code >> number & 1 and not code & ((1 << number) - 1):
            lost = lost + part
    return lost


def _codes(cuts: Sequence[Cut], call: Pass, source: Source) -> Int[Tensor, "b l e"]:
    """At each cell, the cuts of one kind of source that remove it."""
    if len(cuts) > 62:
        raise ValueError(f"{len(cuts)} cuts apply in one layer, at most 62 can: join those that have the same targets")
    view = call.view
    code = torch.zeros(view.batch, view.length, 1, dtype=torch.long, device=view.u.device)
    for i, cut in enumerate(cuts):
        if cut.source == source:
            code = code + call.cells(cut).long() * (1 << i)
    return code


def _last(x: Tensor, k: int, padding: Padding | None) -> Tensor:
    """The last k columns before the next call, from this call's columns and the k before them."""
    first = x.new_full((len(x),), x.shape[1] - k, dtype=torch.long)
    if padding is not None:
        first = first - padding.right
    columns = first[:, None] + torch.arange(k, device=x.device)
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[2]))
