"""One scan done by several libraries: the same inputs in each one's own layout, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.ops import BACKENDS
from tests.benchmarks import child, peers
from tests.benchmarks.memory import peak_above
from tests.benchmarks.report import Table, number, relative_error, timing_table
from tests.benchmarks.sizes import Shape, Sizes
from tests.benchmarks.timing import Timing, race

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, dt, A, B, C, D."""


@dataclass(frozen=True)
class Contender:
    """A scan of one library."""

    call: Callable[..., Tensor]
    positions_last: bool = False
    """Whether x, dt, B, C and y are b E l rather than b l E."""
    module: str | None = None
    """What must be importable."""
    longest_backward: int | None = None
    """Positions beyond which its backward takes minutes."""

    def leaves(self, inputs: Inputs, grad: bool = False) -> list[Tensor]:
        """The inputs in this layout, contiguous."""
        turned = [self.turn(t).contiguous() for t in inputs]
        return [t.detach().clone().requires_grad_() for t in turned] if grad else turned

    def turn(self, t: Tensor) -> Tensor:
        """From one layout to the other, as a view; what has no positions stays."""
        return t.transpose(1, 2) if self.positions_last and t.ndim == 3 else t


def ours(op: str, backend: str, **options: object) -> Contender:
    """Our scan with one backend."""

    def call(*inputs: Tensor) -> Tensor:
        return getattr(ops, op)(*inputs, backend=backend, **options).y

    return Contender(call)


SCANS: dict[str, Contender] = {
    # Its backward makes a gradient of the whole b E l N tensor for every position.
    "transformers": Contender(peers.transformers_scan, positions_last=True, longest_backward=512),
    "mamba.py": Contender(peers.mambapy_scan, module="mambapy.mamba"),
    **{f"ours, {backend}": ours("selective_scan", backend) for backend in ("naive", "torch", "numba")},
}

SSDS: dict[str, Contender] = {
    "transformers, chunk 256": Contender(partial(peers.transformers_ssd, 256)),
    "transformers, chunk 64": Contender(partial(peers.transformers_ssd, 64)),
    **{f"ours, {backend}": ours("ssd", backend) for backend in ("naive", "torch", "numba")},
}

OPS: dict[str, dict[str, Contender]] = {"selective_scan": SCANS, "ssd": SSDS}


def able(op: str, sizes: Sizes) -> dict[str, Contender]:
    """The contenders that can run here."""
    found = {}
    for name, contender in OPS[op].items():
        backend = name.removeprefix("ours, ")
        if name.startswith("ours") and (backend not in BACKENDS[op] or not backend_runs(op, backend, sizes)):
            continue
        if contender.module and peers.why_missing(contender.module):
            continue
        found[name] = contender
    return found


def backend_runs(op: str, backend: str, sizes: Sizes) -> bool:
    """Whether a backend of ours can be used here."""
    if backend == "numba" and not sizes.compiled:
        return False
    try:
        ops.choose(op, torch.zeros(1), 1, frozenset({"grad"}), backend)
    except RuntimeError:
        return False
    return True


def inputs_for(op: str, shape: Shape, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs as a model makes them: steps log-uniform in 0.001 to 0.1, A = -(1..N)."""
    generator = torch.Generator().manual_seed(0)
    b, l = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    def steps(*sizes: int) -> Tensor:
        return 10 ** (-3 + 2 * torch.rand(*sizes, generator=generator))

    if op == "selective_scan":
        E, N = sizes.E, sizes.N
        A = -torch.arange(1.0, N + 1).repeat(E, 1)
        made = normal(b, l, E), steps(b, l, E), A, normal(b, l, N), normal(b, l, N), normal(E)
    else:
        H, P, N = sizes.heads
        A = -torch.linspace(1, 16, H)
        made = normal(b, l, H, P), steps(b, l, H), A, normal(b, l, 1, N), normal(b, l, 1, N), normal(H)
    return tuple(t.to(dtype) for t in made)  # type: ignore[return-value]


def forward(contender: Contender, inputs: Inputs) -> Callable[[], Tensor]:
    """A call without gradients."""
    leaves = contender.leaves(inputs)

    def run() -> Tensor:
        with torch.no_grad():
            return contender.call(*leaves)

    return run


def forward_backward(contender: Contender, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and gradients to all six inputs."""
    leaves = contender.leaves(inputs, grad=True)
    dy = contender.turn(upstream(inputs[0])).contiguous()
    return lambda: torch.autograd.grad(contender.call(*leaves), leaves, dy)


def upstream(x: Tensor) -> Tensor:
    """A fixed gradient of the output."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def compare(op: str, shape: Shape, sizes: Sizes, backward: bool = False) -> tuple[Table, Mapping[str, Timing]]:
    """Time all contenders at one shape and hold what they give against our loop in float64."""
    inputs = inputs_for(op, shape, sizes)
    prepare = forward_backward if backward else forward
    contenders = able(op, sizes)
    runs = {name: prepare(contender, inputs) for name, contender in contenders.items()}
    exact = _tuple(prepare(ours(op, "naive"), inputs_for(op, shape, sizes, torch.float64))())
    errors = {}
    for name, run in runs.items():
        got = [contenders[name].turn(t) for t in _tuple(run())]
        errors[name] = number(max(relative_error(*pair) for pair in zip(got, exact, strict=True)))
    timings = race(runs, sizes)
    what = "forward and backward" if backward else "forward"
    title = f"{op}, {what}, {shape[0]} x {shape[1]}"
    return timing_table(title, timings, next(iter(runs)), extra={"error": errors}), timings


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def memory(op: str, name: str, sizes: Sizes, backward: bool) -> float | None:
    """MiB above the inputs at the long shape; None where the system does not tell or it would take minutes."""
    longest = OPS[op][name].longest_backward
    if backward and longest is not None and sizes.long_shape[1] > longest:
        return None
    return child.call("tests.benchmarks.contenders:memory_here", sizes, op=op, name=name, backward=backward)


def memory_here(sizes: Sizes, op: str, name: str, backward: bool) -> float | None:
    """What :func:`memory` runs in a process of its own: a call at a small shape first, for what loads or compiles."""
    prepare = forward_backward if backward else forward
    prepare(OPS[op][name], inputs_for(op, (1, 8), sizes))()
    return peak_above(prepare(OPS[op][name], inputs_for(op, sizes.long_shape, sizes)))
