"""Compile every Triton kernel as the ops launch it, for GPUs that need not be there, and say what came out.

    python -m tests.hooked_mamba.ops_triton.compiled cuda:90 CASE...
    python -m tests.hooked_mamba.ops_triton.compiled cuda:90            (all, as a table)

Prints a line of JSON per case: {"case": ..., "launches": [...]}, see `compiling.Launch`. Tensors are made at the size
of a model but never written, so they cost no memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from hooked_mamba.ops import StateEdits
from hooked_mamba.ops.causal_conv1d.triton import causal_conv1d
from hooked_mamba.ops.delta_scan.triton import delta_scan
from hooked_mamba.ops.linear_scan.triton import linear_scan
from hooked_mamba.ops.selective_scan.triton import gated_scan, selective_scan
from hooked_mamba.ops.ssd.triton import ssd

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def empty(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> torch.Tensor:
    """A tensor whose memory nobody touches."""
    return torch.empty(shape, dtype=dtype).requires_grad_(grad)


def mamba1(
    dtype: torch.dtype,
    *,
    b: int = 8,
    l: int = 2048,
    E: int = 1536,
    N: int = 16,
    grad: str = "none",
    events: bool = False,
    dense: bool = False,
) -> Callable[[], None]:
    """A selective scan, forward and (grad "all" or "x") backward."""

    def run() -> None:
        everything = grad == "all"
        x, dt = empty(b, l, E, dtype=dtype, grad=grad != "none"), empty(b, l, E, dtype=dtype, grad=everything)
        B, C = (empty(b, l, N, dtype=dtype, grad=everything) for _ in "BC")
        A, D, h0 = empty(E, N, grad=everything), empty(E, grad=everything), empty(b, E, N)
        edits = StateEdits((3, 9), empty(b, 2, E, N, grad=everything), empty(b, 2, E, N, grad=True)) if events else None
        positions = tuple(range(l)) if dense else (5, 9) if events else None
        out = selective_scan(x, dt, A, B, C, D, h0=h0, positions=positions, edits=edits)
        if grad != "none":
            asked = [v for v in out if v is not None]
            torch.autograd.backward(asked, [torch.empty_like(v) for v in asked])

    return run


def gated(
    dtype: torch.dtype, *, b: int = 8, l: int = 2048, E: int = 1536, N: int = 16, grad: str = "none"
) -> Callable[[], None]:
    """The scan between softplus and gate, forward and (grad "all" or "x") backward."""

    def run() -> None:
        everything = grad == "all"
        x, dt_pre = empty(b, l, E, dtype=dtype, grad=grad != "none"), empty(b, l, E, dtype=dtype, grad=everything)
        B, C = (empty(b, l, N, dtype=dtype, grad=everything) for _ in "BC")
        z = empty(b, l, 2 * E, dtype=dtype, grad=everything)[..., E:]
        A, D, h0 = empty(E, N, grad=everything), empty(E, grad=everything), empty(b, E, N)
        out = gated_scan(x, dt_pre, A, B, C, D, z, h0)
        if grad != "none":
            torch.autograd.backward(out, [torch.empty_like(v) for v in out])

    return run


def mamba2(
    dtype: torch.dtype,
    *,
    b: int = 1,
    l: int = 512,
    H: int = 24,
    P: int = 64,
    G: int = 1,
    N: int = 128,
    grad: str = "none",
    events: bool = False,
) -> Callable[[], None]:
    """An SSD scan, forward and backward."""

    def run() -> None:
        everything = grad == "all"
        x = empty(b, l, H, P, dtype=dtype, grad=grad != "none")
        dt, A, D = empty(b, l, H, grad=everything), empty(H, grad=everything), empty(H, grad=everything)
        B, C = (empty(b, l, G, N, dtype=dtype, grad=everything) for _ in "BC")
        size = (b, 2, H, P, N)
        edits = StateEdits((3, 9), empty(*size, grad=everything), empty(*size, grad=True)) if events else None
        positions = (5, 9) if events else None
        out = ssd(x, dt, A, B, C, D, h0=None, positions=positions, chunk=64, edits=edits)
        if grad != "none":
            asked = [v for v in out if v is not None]
            torch.autograd.backward(asked, [torch.empty_like(v) for v in asked])

    return run


def delta(
    dtype: torch.dtype,
    *,
    b: int = 1,
    l: int = 512,
    H: int = 12,
    K: int = 64,
    V: int = 64,
    W: int = 64,
    grad: str = "none",
) -> Callable[[], None]:
    """The delta rule, forward and (grad "all" or "v") backward."""

    def run() -> None:
        everything = grad == "all"
        r, k, a, b_ = (empty(b, l, H, K, dtype=dtype, grad=everything) for _ in "rkab")
        w, v = empty(b, l, H, W, dtype=dtype, grad=everything), empty(b, l, H, V, dtype=dtype, grad=grad != "none")
        out = delta_scan(r, w, k, v, a, b_, h0=empty(b, H, V, K), positions=(3, 9) if everything else None)
        if grad != "none":
            asked = [t for t in out if t is not None] if everything else [out.y]
            torch.autograd.backward(asked, [torch.empty_like(t) for t in asked])

    return run


def linear() -> None:
    """The first-order scan at the size of materialised states, both ways."""
    a, b = (empty(1, 64, 1536, 16, grad=True) for _ in "ab")
    linear_scan(a, b, h0=None).backward(torch.empty(b.shape))


def conv() -> None:
    """Convolution with SiLU, both ways."""
    x, weight, bias = empty(1, 256, 1536, dtype=BF16, grad=True), empty(1536, 1, 4, grad=True), empty(1536, grad=True)
    y = causal_conv1d(x, weight, bias, empty(1, 3, 1536, dtype=BF16, grad=True), silu=True)
    y.backward(torch.empty_like(y))


def mamba2_step() -> None:
    """One position of Mamba-2."""
    mamba2(BF16, l=1)()


CORE: dict[str, Callable[[], None]] = {
    "mamba1 fp32": mamba1(FP32, grad="all"),
    "mamba1 fp32 frozen": mamba1(FP32, grad="x"),
    "mamba1 bf16": mamba1(BF16),
    "gated fp32": gated(FP32, grad="all"),
    "mamba2 bf16": mamba2(BF16),
    "linear": linear,
    "delta fp32": delta(FP32, grad="all"),
}
MORE: dict[str, Callable[[], None]] = {
    "mamba1 bf16 all": mamba1(BF16, grad="all"),
    "mamba1 bf16 frozen": mamba1(BF16, grad="x"),
    "mamba1 fp16 all": mamba1(FP16, grad="all"),
    "mamba1 fp32 wide": mamba1(FP32, E=5120, grad="all"),
    "mamba1 bf16 wide": mamba1(BF16, E=5120, grad="x"),
    "mamba1 fp32 short of channels": mamba1(FP32, b=1, grad="x"),
    "mamba1 fp32 uneven": mamba1(FP32, l=2045, E=1500, grad="all"),
    "mamba1 fp32 uneven frozen": mamba1(FP32, l=2045, E=1500, grad="x"),
    "mamba1 fp32 events": mamba1(FP32, grad="all", events=True),
    "mamba1 fp32 events frozen": mamba1(FP32, grad="x", events=True),
    "mamba1 fp32 dense": mamba1(FP32, b=1, l=64, grad="all", dense=True),
    "mamba1 bf16 step": mamba1(BF16, l=1),
    "mamba1 fp32 N=1": mamba1(FP32, N=1, grad="all"),
    "mamba1 fp32 N=128": mamba1(FP32, N=128, b=1, grad="all"),
    "gated bf16": gated(BF16),
    "gated bf16 all": gated(BF16, grad="all"),
    "gated fp32 frozen": gated(FP32, grad="x"),
    "gated fp32 uneven": gated(FP32, l=2045, E=1500, grad="all"),
    "gated bf16 short of channels": gated(BF16, b=1, grad="x"),
    "gated bf16 step": gated(BF16, l=1),
    "gated fp32 N=128": gated(FP32, N=128, b=1, grad="all"),
    "mamba2 bf16 all": mamba2(BF16, grad="all"),
    "mamba2 fp32 all": mamba2(FP32, grad="all"),
    "mamba2 fp16 all": mamba2(FP16, grad="all"),
    "mamba2 bf16 frozen": mamba2(BF16, grad="x"),
    "mamba2 bf16 events": mamba2(BF16, grad="all", events=True),
    "mamba2 fp32 P=128": mamba2(FP32, P=128, grad="all"),
    "delta bf16": delta(BF16, grad="all"),
    "delta bf16 frozen": delta(BF16, grad="v"),
    "delta fp32 per head": delta(FP32, H=16, K=128, V=128, W=1, grad="all"),
    "mamba2 step": mamba2_step,
    "conv": conv,
}
CASES = CORE | MORE


def main(target: str, names: list[str]) -> None:
    """Compile cases and print what their launches became."""
    from tests.hooked_mamba.ops_triton.compiling import Launch, recorded_launches

    def row(launch: Launch) -> str:
        slots = ", ".join(f"{s:.1f}" for s in launch.slots)
        return (
            f"{launch.kernel:18} warps {launch.warps}  registers {launch.registers}  stack {launch.stack}  "
            f"local loads {launch.local_loads}  shared {launch.shared}  slots {slots}"
        )

    backend, arch = target.split(":")
    for name in names or CASES:
        with recorded_launches(backend, int(arch) if arch.isdigit() else arch) as launches:
            CASES[name]()
        if names:
            print(json.dumps({"case": name, "launches": [launch.summary() for launch in launches]}), flush=True)
        else:
            print("\n    ".join([name, *dict.fromkeys(map(row, launches))]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
