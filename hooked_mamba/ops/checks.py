"""Argument checks of the scans, made once, before any backend is asked."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hooked_mamba.ops.interface import StateEdits


def expect(op: str, sizes: dict[str, int], **tensors: tuple[Tensor | None, str]) -> None:
    """Hold the shape of each tensor against its axes, e.g. `dt=(dt, "b l E")`.

    An axis met for the first time sets its size. None stands for an argument that was left out.

    Raises
    ------
    ValueError
        Names the argument, the shape it has and the shape it should have.
    TypeError
        An argument is not a floating-point tensor.
    """
    for name, (tensor, axes) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {got}")
        names = axes.split()
        shape = tensor.shape
        fits = len(names) == len(shape)
        for n, s in zip(names, shape, strict=False):  # a step of generation is short: no generator here
            fits = fits and sizes.setdefault(n, s) == s
        if not fits:
            wanted = ", ".join(f"{n}={sizes[n]}" if n in sizes else n for n in names)
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected ({wanted})")


def expect_length(op: str, length: int) -> None:
    """Refuse an empty sequence: it has no last position and so no read-out."""
    if length == 0:
        raise ValueError(f"{op}: the sequence is empty (l=0); a scan needs at least one position")


def ascending(op: str, name: str, positions: Iterable[int], length: int) -> tuple[int, ...]:
    """Check that positions are integers, strictly ascending and inside [0, length).

    Raises
    ------
    ValueError
        Names the first offending position.
    """
    if isinstance(positions, Tensor):
        positions = positions.tolist()
    try:
        out = tuple(operator.index(p) for p in positions)
    except TypeError:
        raise TypeError(f"{op}: {name} must hold integers, got {positions!r}") from None
    for i, p in enumerate(out):
        if not 0 <= p < length:
            raise ValueError(f"{op}: {name}[{i}] is {p}, expected a position in [0, {length})")
        if i and p <= out[i - 1]:
            raise ValueError(f"{op}: {name} must be strictly ascending, got {out[i - 1]} before {p}")
    return out


def positions_of(op: str, states_at: Sequence[int] | str | None, length: int) -> tuple[int, ...] | None:
    """Turn the argument `states_at` into a tuple of positions; None if no states are asked for."""
    if states_at is None:
        return None
    if isinstance(states_at, str):
        if states_at != "all":
            raise ValueError(f"{op}: states_at is {states_at!r}, expected positions, 'all' or None")
        return tuple(range(length))
    return ascending(op, "states_at", states_at, length) or None


def checked_edits(
    op: str, edits: StateEdits | None, batch: int, length: int, state: tuple[int, ...]
) -> StateEdits | None:
    """Check the edits of the state; None if they change nothing."""
    if edits is None:
        return None
    at = ascending(op, "edits.at", edits.at, length)
    wanted = (batch, len(at), *state)
    for name, tensor in (("scale", edits.scale), ("add", edits.add)):
        if tensor is None:
            continue
        try:
            fits = torch.broadcast_shapes(tensor.shape, wanted) == wanted
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{op}: edits.{name} has shape {tuple(tensor.shape)}, which does not broadcast to {wanted}"
            )
    if not at or (edits.scale is None and edits.add is None):
        return None
    return StateEdits(at, edits.scale, edits.add)
