"""Running a scan through the hooks on its state, for every kind of mixer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.hooks.points import HookPoint, StateHookPoint
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.state import Call

ScanSegment = Callable[[slice, Tensor | None, list[int] | str | None], ScanOut]
"""(columns, state before them, columns within them whose states are wanted) -> what the scan gives."""

ReadOut = Callable[[Tensor, slice], Tensor]
"""(states b l ..., their columns) -> C h."""


def scan_through_hooks(
    hook_h: StateHookPoint, length: int, h0: Tensor | None, scan: ScanSegment, read_out: ReadOut
) -> tuple[Tensor, Tensor]:
    """The fused scan with states read and edited on the way; returns C h and the last state.

    1. Cut the columns after every position whose state a hook edits.
    2. Scan a segment; its last state passes through the hooks, its last read-out is recomputed from what they return.
    3. Continue from there. States that are only read come out of the same scans, at just their positions.
    4. In a batch padded on the right `hook_h.-1` is edited behind the padding, which leaves a state as it is; what each
       row reads at its own last token is recomputed from the edited state.
    5. Where documents are packed into rows, cut behind each as well; the next one starts from an empty state.
    """
    points = hook_h.points_at(length)
    resets = {} if hook_h.documents is None else hook_h.documents.ends()
    edited = [t for t, at in points.items() if any(point.edited for point in at)]
    wanted = _columns_read(hook_h, points, length)
    if not edited and not wanted and not hook_h.readers and not resets:
        out = scan(slice(0, length), h0, None)
        return out.y, out.h_last

    ends = sorted({*edited, *resets, length - 1})
    ys, states, h, start = [], [], h0, 0
    for end in ends:
        columns = slice(start, end + 1)
        here = [t - start for t in wanted if start <= t <= end]
        out = scan(columns, h, "all" if len(here) == end + 1 - start else here or None)
        y, h, found = out.y, out.h_last, out.states
        if end in edited:
            h = _through(points[end], h)
            y = torch.cat([y[:, :-1], read_out(h.unsqueeze(1), slice(end, end + 1)).to(y.dtype)], 1)
            if found is not None and here[-1] == end - start:
                found = torch.cat([found[:, :-1], h.unsqueeze(1)], 1)
        ys.append(y)
        if found is not None:
            states.append(found)
        h = emptied(h, resets[end]) if end in resets else h
        start = end + 1

    assert h is not None  # at least one segment was scanned
    y = ys[0] if len(ys) == 1 else torch.cat(ys, 1)
    own_ends, last = hook_h.own_ends(), h
    for column, rows in own_ends.items():
        y = _replaced(y, column, rows, read_out(last.unsqueeze(1), slice(column, column + 1))[:, 0])
    if wanted:
        found = states[0] if len(states) == 1 else torch.cat(states, 1)
        for column, rows in own_ends.items():
            found = _replaced(found, wanted.index(column), rows, last) if column in wanted else found
        _give_states(hook_h, points, length, wanted, found)
    else:  # readers who chose no position
        _give_states(hook_h, {}, length, [], h.unsqueeze(1)[:, :0])
    return y, h


def linear_scan_through_hooks(
    hook_h: StateHookPoint, A_bar: Tensor, Bx: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = A_bar_t h_{t-1} + Bx_t with the hooks on single states in line; all states and the last one."""
    return all_states_through_hooks(hook_h, Bx.shape[1], h0, lambda t, h: ops.linear_scan(A_bar[:, t], Bx[:, t], h0=h))


def all_states_through_hooks(
    hook_h: StateHookPoint, length: int, h0: Tensor | None, states_of: Callable[[slice, Tensor | None], Tensor]
) -> tuple[Tensor, Tensor]:
    """Every state, by `states_of(columns, state before them)`, with the hooks on single states in line; and the last
    one."""
    points = hook_h.points_at(length)
    resets = {} if hook_h.documents is None else hook_h.documents.ends()
    pieces, h, start = [], h0, 0
    for end in sorted({*points, *resets, length - 1}):
        piece = states_of(slice(start, end + 1), h)
        h = piece[:, -1]
        if end in points:
            h = _through(points[end], h)
            piece = torch.cat([piece[:, :-1], h.unsqueeze(1)], 1)
        pieces.append(piece)
        h = emptied(h, resets[end]) if end in resets else h
        start = end + 1
    assert h is not None
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    for column, rows in hook_h.own_ends().items():
        joined = _replaced(joined, column, rows, h)
    # A view would keep all states alive for as long as the memory of the model is kept.
    return joined, h.clone()


def emptied(h: Tensor, rows: Tensor) -> Tensor:
    """A state with zeros in chosen rows."""
    return torch.where(rows.reshape(-1, *(1,) * (h.ndim - 1)), torch.zeros((), dtype=h.dtype, device=h.device), h)


def _replaced(values: Tensor, column: int, rows: Tensor, new: Tensor) -> Tensor:
    """b l ... with new values of some rows at one column."""
    rows = rows.reshape(-1, *(1,) * (new.ndim - 1))
    new = torch.where(rows, new.to(values.dtype), values[:, column]).unsqueeze(1)
    return torch.cat([values[:, :column], new, values[:, column + 1 :]], 1)


def rows_known(branch: nn.Module, call: Call | None) -> AbstractContextManager[None]:
    """Tell a branch's hook points on states, for one call, where its rows are padded and where documents start."""
    return _NOTHING_TO_TELL if call is None or call.plain else _rows_told(branch, call)


_NOTHING_TO_TELL = nullcontext()


@contextmanager
def _rows_told(branch: nn.Module, call: Call) -> Iterator[None]:
    points = [point for point in branch.modules() if isinstance(point, StateHookPoint)]
    for point in points:
        point.padding, point.documents = call.padding, call.documents
    try:
        yield
    finally:
        for point in points:
            point.padding = point.documents = None


def _through(names_of_one_state: list[HookPoint], h: Tensor) -> Tensor:
    """A state through the hooks of its names (`hook_h.9` and `hook_h.-1` may be one); all read what all made of it."""
    for point in names_of_one_state:
        h = point.edit(h)
    for point in names_of_one_state:
        point.show(h)
    return h


def _columns_read(hook_h: StateHookPoint, points: dict[int, list], length: int) -> list[int]:
    """Columns (ascending) whose states are read but not edited."""
    columns = {t for t, at in points.items() if not any(point.edited for point in at)}
    for reader in hook_h.readers:
        index = reader.select.index(length)
        columns.update(range(length) if isinstance(index, slice) else index)
    return sorted(columns)


def _give_states(
    hook_h: StateHookPoint, points: dict[int, list], length: int, columns: list[int], states: Tensor
) -> None:
    """Pass the states of `columns` to the readers of hook_h and of its single positions."""
    place = {t: i for i, t in enumerate(columns)}

    def states_at(index: list[int] | slice) -> Tensor:
        if isinstance(index, slice):
            return states
        return states[:, [place[t] for t in index]]

    hook_h.read(length, states_at)
    for t, at in points.items():
        for point in at:
            if not point.edited:
                point(states[:, place[t]])
