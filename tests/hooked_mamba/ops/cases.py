"""Inputs of the scans, and one way to compare a backend with the naive loop in float64: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from hypothesis import strategies as st
from torch import Tensor

from hooked_mamba.ops import StateEdits

NUMBA = find_spec("numba") is not None
SELECTIVE_BACKENDS = [("torch", torch.float64), ("torch", torch.float32), *[("numba", torch.float32)] * NUMBA]
SSD_BACKENDS = list(SELECTIVE_BACKENDS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}


def selective_inputs(b: int, l: int, E: int, N: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `selective_scan` in float64 that float32 holds exactly, so that both see the same numbers."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).double()

    return {
        "x": normal(b, l, E),
        "dt": torch.rand(b, l, E, generator=random).double(),
        "A": -4 * torch.rand(E, N, generator=random).double(),
        "B": normal(b, l, N),
        "C": normal(b, l, N),
        "D": normal(E),
        "h0": normal(b, E, N),
    }


def ssd_inputs(b: int, l: int, H: int, P: int, G: int, N: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `ssd`, as above."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).double()

    return {
        "x": normal(b, l, H, P),
        "dt": torch.rand(b, l, H, generator=random).double(),
        "A": -4 * torch.rand(H, generator=random).double(),
        "B": normal(b, l, G, N),
        "C": normal(b, l, G, N),
        "D": normal(H),
        "h0": normal(b, H, P, N),
    }


def outcome(
    op: Callable,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    edits: StateEdits | None = None,
    leave_out: tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("y", "h_last", "states"),
    **options: object,
) -> dict[str, Tensor]:
    """Outputs by name, and the gradients ("to x", ...) of a fixed random weighting of those in `outputs`."""
    leaves = {k: v.to(dtype).requires_grad_() for k, v in inputs.items() if k not in leave_out}
    arguments = dict(leaves)
    if edits is not None:
        changes = {k: v.to(dtype).requires_grad_() for k, v in edits._asdict().items() if isinstance(v, Tensor)}
        arguments["edits"] = edits._replace(**changes)
        leaves |= changes
    out = op(**arguments, backend=backend, **options)
    results = {k: v.detach() for k, v in out._asdict().items() if v is not None}
    random = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for name in outputs:
        value = getattr(out, name)
        if value is not None:
            loss = loss + (value.double() * torch.randn(value.shape, generator=random)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, leaf, grad in zip(leaves, leaves.values(), grads, strict=True):
        results[f"to {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def assert_close(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float,
    loop: Callable[[], dict[str, Tensor]] | None = None,
) -> None:
    """Largest error of every tensor, against its largest number or 1, the size of the inputs.

    `loop` gives the naive loop's own results in the precision under test: where sums cancel so much that they miss
    the tolerance, it is enough to err no more than they do.
    """
    assert got.keys() == expected.keys()
    for name, value in got.items():
        reference = expected[name]
        assert value.shape == reference.shape, name
        assert torch.isfinite(value).all(), name
        error = (value.double() - reference).abs().max().item()
        # The gradient to A sums terms of both signs over the batch and all positions: the loop loses as much there.
        allowed = tolerance * (5 if name == "to A" else 1)
        bound = allowed * max(reference.abs().max().item(), 1)
        if error > bound and loop is not None:
            bound = (loop()[name].double() - reference).abs().max().item()
        assert error <= bound, (name, error)


def assert_agrees(op: Callable, inputs: dict[str, Tensor], dtype: torch.dtype, backend: str, **options) -> None:
    """Hold a backend against the naive loop in float64."""
    expected = outcome(op, inputs, torch.float64, "naive", **options)
    assert_close(
        outcome(op, inputs, dtype, backend, **options),
        expected,
        TOLERANCE[dtype],
        loop=lambda: outcome(op, inputs, dtype, "naive", **options),
    )


def lengths() -> st.SearchStrategy[int]:
    """Lengths up to 130; those around the sizes of blocks and chunks as often as all others together."""
    return st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130]) | st.integers(1, 130)


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Sizes of any other axis; 1 and the largest as often as all others together."""
    return st.sampled_from([1, largest]) | st.integers(1, largest)


def some_positions(kind: str | None, l: int) -> list[int] | str | None:
    """None, "all", or the positions that the word names."""
    return {"one": [l // 2], "several": sorted({0, l // 3, l - 1}), "last": [l - 1], "most": [*range(l // 9, l)]}.get(
        kind, kind
    )


def random_edits(at: list[int], kind: str, inputs: dict[str, Tensor]) -> StateEdits:
    """Edits with a scale, an add, or both."""
    b, *state = inputs["h0"].shape
    random = torch.Generator().manual_seed(3)
    scale, add = (torch.randn(b, len(at), *state, generator=random) for _ in range(2))
    return StateEdits(at, None if kind == "add" else scale, None if kind == "scale" else add)
