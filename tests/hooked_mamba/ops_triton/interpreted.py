"""Run the Triton kernels on small inputs and compare them with the naive loop in float64: values and gradients.

    TRITON_INTERPRET=1 python -m tests.hooked_mamba.ops_triton.interpreted cpu CASE...       (no GPU)
    python -m tests.hooked_mamba.ops_triton.interpreted cuda CASE...

A process of its own, because the interpreter has to be asked for before triton is imported. Prints a line of JSON per
case: {"case": ..., "errors": {name: largest error over largest value}}.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.components import causal_conv1d
from hooked_mamba.ops import StateEdits
from hooked_mamba.ops.causal_conv1d.triton import causal_conv1d as fused_conv
from tests.hooked_mamba.ops.cases import selective_inputs, ssd_inputs
from tests.hooked_mamba.ops.delta_cases import delta_inputs

Case = Callable[[str], dict[str, float]]
SCANNED_TYPES = ("x", "dt", "B", "C", "dt_pre", "z", "r", "w", "k", "v", "a", "b")
"""Arguments that come in the type of the model; the others are float32 in any model."""


def patched(name: str, value: object) -> AbstractContextManager:
    """Another value for a constant, by its name inside `hooked_mamba.ops`; only modules have the names of ops there."""
    module, constant = name.rsplit(".", 1)
    return patch.object(importlib.import_module(f"hooked_mamba.ops.{module}"), constant, value)


def evaluate(run: Callable, leaves: dict[str, Tensor], frozen: bool = False) -> dict[str, Tensor]:
    """Outputs by name, and gradients of a fixed random weighting of them."""
    out = run(leaves)
    if hasattr(out, "_asdict"):
        named = out._asdict()
    else:
        named = dict(zip(("y", "h_last"), out, strict=True)) if isinstance(out, tuple) else {"y": out}
    random = torch.Generator().manual_seed(7)
    weighted = [
        (v.double() * torch.randn(v.shape, generator=random).to(v.device)).sum()
        for v in named.values()
        if v is not None
    ]
    wanted = [k for k, v in leaves.items() if v.requires_grad]
    grads = torch.autograd.grad(sum(weighted), [leaves[k] for k in wanted], allow_unused=frozen)
    outputs = {k: v.detach() for k, v in named.items() if v is not None}
    return outputs | {f"to {k}": g for k, g in zip(wanted, grads, strict=True) if g is not None}


def compare(
    device: str,
    inputs: dict[str, Tensor],
    exact: Callable,
    fast: Callable,
    dtype: torch.dtype = torch.float32,
    frozen: bool = False,
) -> dict[str, float]:
    """Largest error of each output and gradient, relative to the largest value in float64."""
    inputs = {k: v.to(dtype).double() if k in SCANNED_TYPES else v for k, v in inputs.items()}
    reference = evaluate(exact, {k: v.clone().requires_grad_() for k, v in inputs.items()}, frozen)

    def leaf(name: str, value: Tensor) -> Tensor:
        return value.to(device, dtype if name in SCANNED_TYPES else torch.float32).requires_grad_()

    found = evaluate(fast, {k: leaf(k, v) for k, v in inputs.items()}, frozen)
    if found.keys() != reference.keys():
        raise AssertionError(f"got {sorted(found)}, expected {sorted(reference)}")
    return {
        k: ((found[k].cpu().double() - v).abs().max() / v.abs().max().clamp_min(1e-30)).item()
        for k, v in reference.items()
    }


def scan(op: Callable, inputs: dict[str, Tensor], *, edits: tuple[int, ...] = (), **options: object) -> Case:
    """A case of `selective_scan` or `ssd`; edits at positions multiply and add."""
    dtype = options.pop("dtype", torch.float32)
    patches = options.pop("patches", {})
    options.setdefault("frozen", False)
    if edits:
        state = inputs["h0"].shape
        random = torch.Generator().manual_seed(3)
        inputs["scale"] = torch.randn(state[0], len(edits), *state[1:], generator=random).double()
        inputs["add"] = torch.randn(1, len(edits), *state[1:-1], 1, generator=random).double()

    def run(backend: str) -> Callable:
        def call(leaves: dict[str, Tensor]) -> ops.ScanOut:
            arguments = {k: v for k, v in leaves.items() if k not in ("scale", "add")}
            if edits:
                arguments["edits"] = StateEdits(edits, leaves["scale"], leaves["add"])
            return op(**arguments, **options, backend=backend)

        return call

    def case(device: str) -> dict[str, float]:
        with ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(patched(name, value))
            return compare(device, inputs, run("naive"), run("triton"), dtype, options["frozen"])

    return case


def mamba1_case(*shape: int, **options: object) -> Case:
    """b, l, E, N."""
    return scan(ops.selective_scan, selective_inputs(*shape), **options)


def ssd_case(*shape: int, **options: object) -> Case:
    """b, l, H, P, G, N."""
    return scan(ops.ssd, ssd_inputs(*shape), **options)


def delta_case(*shape: int, per: str = "key", **options: object) -> Case:
    """b, l, H, K, V, with decays per "key" or per "head"."""
    return scan(ops.delta_scan, delta_inputs(*shape, per), **options)


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """All but some arguments."""
    return {k: v for k, v in inputs.items() if k not in names}


def gated_case(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    frozen: bool = False,
    empty: bool = False,
    patches: dict | None = None,
) -> Case:
    """b, l, E, N: the scan between softplus and gate; z stands in a wider tensor, as it does in a model. Empty: no h0.

    Frozen: gradients to x and h0 alone are asked for.
    """
    inputs = selective_inputs(*shape)
    random = torch.Generator().manual_seed(5)
    if empty:
        del inputs["h0"]
    inputs["dt_pre"] = 3 * torch.randn(inputs.pop("dt").shape, generator=random).double() - 2
    inputs["z"] = 2 * torch.randn(*shape[:2], 2 * shape[2], generator=random).double()

    def run(backend: str) -> Callable:
        def call(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            constant = {k: v.detach() if frozen and k not in ("x", "h0") else v for k, v in leaves.items()}
            constant |= {"z": constant["z"][..., shape[2] :]} | ({"h0": None} if empty else {})
            return ops.gated_scan(**constant, backend=backend)

        return call

    def case(device: str) -> dict[str, float]:
        with ExitStack() as stack:
            for name, value in (patches or {}).items():
                stack.enter_context(patched(name, value))
            return compare(device, inputs, run("naive"), run("triton"), dtype, frozen)

    return case


def linear_case(a_shape: tuple[int, ...], b_shape: tuple[int, ...], h0: bool) -> Case:
    """Scan with decays of both signs."""
    random = torch.Generator().manual_seed(0)
    inputs = {
        "a": 2 * torch.rand(a_shape, generator=random).double() - 1,
        "b": torch.randn(b_shape, generator=random).double(),
    }
    if h0:
        inputs["h0"] = torch.randn(b_shape[0], *b_shape[2:], generator=random).double()

    def run(backend: str) -> Callable:
        return lambda leaves: ops.linear_scan(**leaves, backend=backend)

    def case(device: str) -> dict[str, float]:
        with patched("linear_scan._triton_scan.TILE", 256):
            return compare(device, inputs, run("naive"), run("triton"))

    return case


def conv_case(b: int, l: int, c: int, k: int, bias: bool, silu: bool, history: int = 0) -> Case:
    """The convolution; x stands in a wider tensor, as it does in a model."""
    random = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(b, l, 2 * c, generator=random).double(),
        "weight": torch.randn(c, 1, k, generator=random).double(),
    }
    if bias:
        inputs["bias"] = torch.randn(c, generator=random).double()
    if history:
        inputs["history"] = torch.randn(b, history, c, generator=random).double()

    def run(conv: Callable) -> Callable:
        return lambda leaves: conv(leaves["x"][..., :c], leaves["weight"], leaves.get("bias"), leaves.get("history"))

    def exact(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
        y = causal_conv1d(x if history is None else torch.cat([history, x], 1), weight, bias)
        return F.silu(y) if silu else y

    def fused(*arguments: Tensor | None) -> Tensor:
        return fused_conv(*arguments, silu=silu)

    return lambda device: compare(device, inputs, run(exact), run(fused))


def step_case() -> Case:
    """A single position of Mamba-2 without gradients, which has a kernel of its own."""

    def case(device: str) -> dict[str, float]:
        inputs = ssd_inputs(2, 1, 4, 5, 2, 6)
        with torch.no_grad():
            reference = ops.ssd(**inputs, states_at=[0], backend="naive")
            found = ops.ssd(**{k: v.float().to(device) for k, v in inputs.items()}, states_at=[0], backend="triton")
        pairs = zip(reference._fields, reference, found, strict=True)
        return {k: ((f.cpu().double() - r).abs().max() / r.abs().max()).item() for k, r, f in pairs}

    return case


def repeats_case() -> Case:
    """Two runs give the same bits, gradients too."""

    def case(device: str) -> dict[str, float]:
        inputs = {k: v.float().to(device).requires_grad_() for k, v in selective_inputs(2, 19, 10, 4).items()}
        first, second = (evaluate(lambda leaves: ops.selective_scan(**leaves, backend="triton"), inputs) for _ in "12")
        return {k: float(not torch.equal(v, second[k])) for k, v in first.items()}

    return case


def far_case() -> Case:
    """On a GPU, a tensor of more than 2^31 numbers: its last channels are scanned as they are by themselves."""

    def case(device: str) -> dict[str, float]:
        l, E = (65_600, 32_800) if device == "cuda" else (12, 40)
        x, dt = (torch.rand(1, l, E, dtype=torch.bfloat16, device=device) for _ in "xd")
        A, B, C = -torch.rand(E, 1, device=device), *(torch.rand(1, l, 1, device=device) for _ in "BC")
        whole = ops.selective_scan(x, dt, A, B, C, backend="triton")
        last = ops.selective_scan(x[..., -8:].clone(), dt[..., -8:].clone(), A[-8:], B, C, backend="triton")
        pairs = {"y": (whole.y[..., -8:], last.y), "h_last": (whole.h_last[:, -8:], last.h_last)}
        return {k: ((a.double() - b.double()).abs().max() / b.abs().max()).item() for k, (a, b) in pairs.items()}

    return case


BF16, FP16 = torch.bfloat16, torch.float16
NARROW = {"triton_launch.FALLBACK_MULTIPROCESSORS": 0}
"""A device so small that it is full at once: the sequence is not shared out among programs."""
SHORT = {"selective_scan._triton_scan.CHUNK": 8}
"""Short chunks, so that small inputs have several."""

SHORT_DELTA = {"delta_scan._triton_scan.T": 8}

CORE: dict[str, Case] = {
    "mamba1": mamba1_case(2, 13, 5, 4, patches=SHORT),
    "mamba1 whole": mamba1_case(1, 16, 9, 16, patches=SHORT | NARROW),
    "mamba1 edits": mamba1_case(2, 21, 9, 8, states_at=(0, 3, 4, 20), edits=(3, 7, 20), patches=SHORT),
    "mamba1 frozen": mamba1_case(1, 19, 9, 4, states_at=(2,), edits=(3, 7), frozen=True, patches=SHORT),
    "mamba1 bf16": mamba1_case(1, 11, 5, 4, dtype=BF16),
    "gated": gated_case(2, 13, 5, 4, patches=SHORT),
    "linear": linear_case((2, 19, 3, 2), (2, 19, 3, 2), True),
    "ssd": ssd_case(1, 19, 2, 3, 1, 5, chunk=16),
    "ssd edits": ssd_case(1, 9, 2, 4, 1, 4, chunk=16, states_at=(0, 3, 8), edits=(3, 8)),
    "ssd step": step_case(),
    "conv": conv_case(2, 20, 6, 4, True, True, history=3),
    "delta": delta_case(1, 19, 2, 5, 7, states_at=(0, 3, 18), patches=SHORT_DELTA),
    "delta frozen": delta_case(1, 9, 2, 4, 3, per="head", frozen=True, patches=SHORT_DELTA),
}
"""A minute on one core."""

MORE: dict[str, Case] = {
    "mamba1 odd N": mamba1_case(1, 37, 9, 5, patches=SHORT),
    "mamba1 one state": mamba1_case(1, 9, 7, 1, patches=SHORT),
    "mamba1 one position": mamba1_case(2, 1, 9, 16),
    "mamba1 long": mamba1_case(1, 150, 4, 2),
    "mamba1 wide": mamba1_case(1, 12, 70, 16, patches=SHORT),
    "mamba1 many states": mamba1_case(1, 12, 5, 64, patches=SHORT),
    "mamba1 all states": mamba1_case(1, 13, 9, 8, states_at="all", patches=SHORT),
    "mamba1 all states whole": mamba1_case(1, 13, 9, 8, states_at="all", patches=SHORT | NARROW),
    "mamba1 all states edited": mamba1_case(1, 13, 9, 8, states_at="all", edits=(0, 12), patches=SHORT),
    "mamba1 edits whole": mamba1_case(1, 21, 9, 8, states_at=(2, 7), edits=(3, 7), patches=SHORT | NARROW),
    "mamba1 frozen even": mamba1_case(1, 24, 9, 4, frozen=True, patches=SHORT),
    "mamba1 frozen whole": mamba1_case(1, 21, 9, 4, states_at="all", frozen=True, patches=SHORT | NARROW),
    "mamba1 fp16": mamba1_case(1, 21, 9, 8, dtype=FP16),
    "mamba1 without D and h0": scan(ops.selective_scan, without(selective_inputs(2, 11, 5, 4), "D", "h0")),
    "mamba1 repeats": repeats_case(),
    "mamba1 far bf16": far_case(),
    "gated even": gated_case(1, 16, 32, 16, patches=SHORT),
    "gated odd N": gated_case(1, 19, 9, 5, patches=SHORT | NARROW),
    "gated wide": gated_case(1, 12, 70, 16, patches=SHORT),
    "gated one position": gated_case(2, 1, 9, 16),
    "gated bf16": gated_case(1, 21, 9, 8, dtype=BF16, patches=SHORT),
    "gated fp16": gated_case(1, 21, 9, 8, dtype=FP16),
    "gated from nothing": gated_case(2, 13, 9, 4, empty=True, patches=SHORT),
    "gated from nothing whole": gated_case(1, 16, 9, 4, empty=True, frozen=True, patches=SHORT | NARROW),
    "gated frozen": gated_case(2, 19, 9, 4, frozen=True, patches=SHORT),
    "gated frozen whole": gated_case(1, 16, 9, 4, frozen=True, patches=SHORT | NARROW),
    "linear broadcast": linear_case((37, 1, 3), (1, 37, 2, 3), False),
    "linear one column": linear_case((2, 300, 1), (2, 300, 1), True),
    "linear one position": linear_case((2, 1, 1), (2, 1, 70), True),
    "ssd groups": ssd_case(2, 21, 4, 3, 2, 5, chunk=16),
    "ssd wide": ssd_case(1, 37, 2, 70, 1, 66, chunk=16),
    "ssd long chunk": ssd_case(1, 70, 2, 8, 1, 16, chunk=64),
    "ssd edited and frozen": ssd_case(1, 21, 4, 8, 1, 16, chunk=16, states_at=(2,), edits=(3, 7, 20), frozen=True),
    "ssd frozen": ssd_case(1, 21, 4, 8, 1, 16, chunk=16, frozen=True),
    "ssd all states": ssd_case(1, 9, 2, 4, 1, 4, chunk=16, states_at="all"),
    "ssd bf16": ssd_case(1, 21, 4, 8, 1, 16, chunk=16, dtype=BF16),
    "ssd fp16": ssd_case(1, 21, 4, 8, 1, 16, chunk=16, dtype=FP16),
    "ssd without D and h0": scan(ops.ssd, without(ssd_inputs(2, 11, 2, 4, 1, 4), "D", "h0")),
    "ssd one position": ssd_case(2, 1, 4, 5, 2, 6),
    "delta per head": delta_case(2, 33, 2, 16, 20, per="head"),
    "delta multiple": delta_case(1, 9, 2, 5, 4, per="multiple"),
    "delta long": delta_case(1, 70, 1, 8, 4),
    "delta blocks": delta_case(1, 9, 2, 64, 40, patches=SHORT_DELTA),
    "delta all states": delta_case(1, 9, 2, 4, 3, states_at="all", patches=SHORT_DELTA),
    "delta edits": delta_case(1, 19, 2, 5, 7, states_at=(0, 3), edits=(3, 18), patches=SHORT_DELTA),
    "delta edits frozen": delta_case(1, 9, 2, 5, 7, states_at=(0, 3), edits=(3, 8), frozen=True),
    "delta one position": delta_case(2, 1, 2, 4, 3),
    "delta from nothing": scan(ops.delta_scan, without(delta_inputs(2, 11, 2, 4, 3), "h0")),
    "delta bf16": delta_case(1, 21, 2, 8, 8, dtype=BF16),
    "delta fp16": delta_case(1, 21, 2, 8, 8, dtype=FP16),
    "conv plain": conv_case(1, 37, 5, 3, False, False),
    "conv step": conv_case(2, 1, 5, 4, True, True, history=3),
    "conv long history": conv_case(2, 5, 5, 3, False, False, history=9),
    "conv without history": conv_case(2, 20, 6, 4, True, True),
    "conv shortest": conv_case(1, 4, 5, 4, True, False),
}

CASES = CORE | MORE


def main(device: str, names: list[str]) -> None:
    """Run cases and print their errors."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory then holds NaN: what is read was written
    for name in names:
        print(json.dumps({"case": name, "errors": CASES[name](device)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
