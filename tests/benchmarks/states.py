"""What it costs to see states on the way, and to have gradients with the selection frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hooked_mamba import ops
from tests.benchmarks.contenders import backend_runs, inputs_for, upstream
from tests.benchmarks.report import Bound, Section, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import race, ratio

BACKENDS = ("torch", "numba")


def run(sizes: Sizes) -> Section:
    """States at chosen positions, all states, and the frozen adjoint, each against the scan it extends."""
    b, l = sizes.long_shape
    section = Section(
        "States by position, and the frozen adjoint",
        f"One layer, E={sizes.E}, N={sizes.N}, float32. States are written into fresh memory each time and belong to"
        " the caller. The frozen adjoint gives the gradient to x with dt, A, B, C and D held, which attribution needs.",
    )
    every = {"fused scan": None, "states at 1/16 of positions": range(0, l, 16), "all states": "all"}
    for backend in BACKENDS:
        if not backend_runs("selective_scan", backend, sizes):
            continue
        timings = race({what: _scan(sizes, backend, at) for what, at in every.items()}, sizes)
        section.tables.append(timing_table(f"States, {backend}, {b} x {l}", timings, "fused scan", cost=True))
        if sizes.claims:
            cost = ratio(timings["all states"], timings["fused scan"])
            section.bounds.append(Bound(f"All states, {backend}, times the fused scan", cost, 3.5, False))

        b_grad, l_grad = sizes.grad_shape
        runs = {
            "forward": _adjoint(sizes, backend, backward=False, frozen=True),
            "forward and backward, frozen": _adjoint(sizes, backend, backward=True, frozen=True),
            "forward and backward, all gradients": _adjoint(sizes, backend, backward=True, frozen=False),
        }
        title = f"Gradients, {backend}, {b_grad} x {l_grad}"
        section.tables.append(timing_table(title, race(runs, sizes), "forward", cost=True))
    return section


def _scan(sizes: Sizes, backend: str, states_at: Any) -> Callable[[], Any]:
    inputs = inputs_for("selective_scan", sizes.long_shape, sizes)
    at = list(states_at) if isinstance(states_at, range) else states_at

    def run() -> Any:
        with torch.no_grad():
            return ops.selective_scan(*inputs, states_at=at, backend=backend)

    return run


def _adjoint(sizes: Sizes, backend: str, backward: bool, frozen: bool) -> Callable[[], Any]:
    inputs = [t.requires_grad_() for t in inputs_for("selective_scan", sizes.grad_shape, sizes)]
    dy = upstream(inputs[0].detach())

    def run() -> Any:
        y = ops.selective_scan(*inputs, frozen=frozen, backend=backend).y
        return torch.autograd.grad(y, inputs[:1] if frozen else inputs, dy) if backward else y

    return run
