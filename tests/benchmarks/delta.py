"""The scan of the delta rule at the shapes of RWKV-7 and gated DeltaNet: loops, chunks, and the floor of arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hooked_mamba import ops
from tests.benchmarks import peers
from tests.benchmarks.contenders import backend_runs, upstream
from tests.benchmarks.report import Bound, Section, number, relative_error, timing_table
from tests.benchmarks.sizes import Shape, Sizes
from tests.benchmarks.timing import Timing, race, ratio

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""r, w, k, v, the address that is removed, and how much of it."""

BACKENDS = ("naive", "torch", "numba")
SLOTS = {"RWKV-7": 5, "Gated DeltaNet": 4}
"""Multiply-adds per number of the state and position that the equations need."""


def run(sizes: Sizes) -> Section:
    """Forward at several shapes, forward with backward at one, for both."""
    (H, K), (H_gdn, K_gdn) = sizes.delta_heads
    section = Section(
        "The scan of the delta rule",
        f"RWKV-7 with {H} heads of {K} x {K}, gated DeltaNet with {H_gdn} of {K_gdn} x {K_gdn}, float32. The loop of"
        " products is what the package `rwkv` does a position at a time without its kernel; transformers' chunks are"
        " those of Qwen3-Next. The floor is the time that the multiply-adds of the equations take at the rate measured"
        " here with nothing else to do. Errors are against the loop in float64.",
    )
    rate = multiply_adds_per_second() if sizes.compiled and backend_runs("delta_scan", "numba", sizes) else None
    for kind in SLOTS:
        for shape in sizes.shapes:
            timings = compare(section, kind, shape, sizes, rate)
            if sizes.claims and shape == sizes.grad_shape and "ours, numba" in timings:
                section.bounds += bounds(kind, timings, floor(kind, shape, sizes, rate))
        _backward(section, kind, sizes)
    return section


def floor(kind: str, shape: Shape, sizes: Sizes, rate: float | None) -> float:
    """Milliseconds of multiply-adds."""
    H, K = sizes.delta_heads[list(SLOTS).index(kind)]
    return 1e3 * SLOTS[kind] * shape[0] * shape[1] * H * K * K / rate if rate else float("nan")


def bounds(kind: str, timings: Mapping[str, Timing], least_ms: float) -> list[Bound]:
    """What is promised at one sequence."""
    ours = timings["ours, numba"]
    of_floor = Bound(f"{kind}, numba, times its floor", ours.cpu_ms / least_ms, 2.5, False)
    if kind == "RWKV-7":
        gain = ratio(timings["loop of products"], ours)
        return [of_floor, Bound("RWKV-7, numba, times faster than the loop of products", gain, 20, True)]
    gain = ratio(timings["transformers, chunks"], ours)
    return [of_floor, Bound("Gated DeltaNet, numba, times faster than transformers' chunks", gain, 4, True)]


def inputs_for(kind: str, shape: Shape, sizes: Sizes) -> Inputs:
    """Random inputs as the models make them: unit keys, RWKV-7's decays in (0.545, 1), DeltaNet's one per head."""
    random = torch.Generator().manual_seed(0)
    rwkv = kind == "RWKV-7"
    H, K = sizes.delta_heads[list(SLOTS).index(kind)]

    def normal(*last: int) -> Tensor:
        return torch.randn(*shape, H, *last, generator=random)

    w = torch.exp(-0.6065 * torch.sigmoid(normal(K))) if rwkv else torch.exp(-torch.exp(normal(1) - 2))
    key = torch.nn.functional.normalize(normal(K), dim=-1)
    return normal(K), w, normal(K) if rwkv else key, normal(K), key, torch.sigmoid(normal(K if rwkv else 1))


def ours(kind: str, backend: str) -> Callable[..., Tensor]:
    """Our op on a model's quantities."""

    def call(r: Tensor, w: Tensor, k: Tensor, v: Tensor, key: Tensor, rate: Tensor) -> Tensor:
        if kind == "RWKV-7":
            return ops.delta_scan(r, w, k, v, key, -rate * key, backend=backend).y
        return ops.delta_scan(r, w, k, rate * v, key, -w * rate, backend=backend).y

    return call


def loop_of_products(r: Tensor, w: Tensor, k: Tensor, v: Tensor, key: Tensor, rate: Tensor) -> Tensor:
    """RWKV-7 a position at a time: the rank-one part as a matrix, which multiplies the state."""
    S, ys = r.new_zeros(r.shape[0], *r.shape[2:], r.shape[3]), []
    for t in range(r.shape[1]):
        written = v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        removed = -key[:, t].unsqueeze(-1) @ (key[:, t] * rate[:, t]).unsqueeze(-2)
        S = S * w[:, t].unsqueeze(-2) + S @ removed + written
        ys.append((S @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, 1)


def contenders(kind: str, sizes: Sizes) -> dict[str, Callable[..., Tensor]]:
    """All that can run here."""
    peer = {"loop of products": loop_of_products} if kind == "RWKV-7" else {"transformers, chunks": peers.gated_delta}
    able = [backend for backend in BACKENDS if backend_runs("delta_scan", backend, sizes)]
    return peer | {f"ours, {backend}": ours(kind, backend) for backend in able}


def compare(section: Section, kind: str, shape: Shape, sizes: Sizes, rate: float | None) -> Mapping[str, Timing]:
    """Add a table of one shape, forward."""
    inputs = inputs_for(kind, shape, sizes)
    calls = contenders(kind, sizes)
    with torch.no_grad():
        exact = ours(kind, "naive")(*(t.double() for t in inputs))
        errors = {name: number(relative_error(call(*inputs), exact)) for name, call in calls.items()}
        timings = race({name: lambda call=call: call(*inputs) for name, call in calls.items()}, sizes)
    extra = {"error": errors}
    if rate:
        least = floor(kind, shape, sizes, rate)
        extra["times the floor"] = {name: number(timing.cpu_ms / least) for name, timing in timings.items()}
    title = f"{kind}, forward, {shape[0]} x {shape[1]}"
    section.tables.append(timing_table(title, timings, next(iter(calls)), extra=extra))
    return timings


def _backward(section: Section, kind: str, sizes: Sizes) -> None:
    """Add a table of forward and all gradients."""
    leaves = [t.requires_grad_() for t in inputs_for(kind, sizes.grad_shape, sizes)]
    dy = upstream(leaves[3].detach())

    def run(call: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(call(*leaves), leaves, dy)

    calls = {name: run(call) for name, call in contenders(kind, sizes).items()}
    if kind != "RWKV-7":  # its key is also the address: one leaf there, two here
        calls.pop("transformers, chunks")
    title = f"{kind}, forward and backward, {sizes.grad_shape[0]} x {sizes.grad_shape[1]}"
    section.tables.append(timing_table(title, race(calls, sizes), next(iter(calls))))


def multiply_adds_per_second(seconds: float = 0.2) -> float:
    """How many multiply-adds of float32 one thread does in a second, ten independent vectors in registers."""
    import numba

    from hooked_mamba.ops.numba_lanes import add, fma, splat, total

    half, one = numba.float32(0.5), numba.float32(1)

    @numba.njit(nogil=True)
    def chains(steps):
        a, b, c, d, e = splat(one), splat(half), splat(one), splat(half), splat(one)
        x, y = splat(half), splat(one)
        for _ in range(steps):
            a, b, c, d, e = fma(a, x, y), fma(b, x, y), fma(c, x, y), fma(d, x, y), fma(e, x, y)
        return total(add(add(add(a, b), add(c, d)), e))

    chains(1)  # compiles
    steps, best, started = 1 << 20, 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.process_time()
        chains(steps)
        best = max(best, 5 * 16 * steps / (time.process_time() - before))
    return best
