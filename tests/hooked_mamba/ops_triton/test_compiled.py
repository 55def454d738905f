"""Every Triton kernel compiles for GPUs that are not here, as the ops launch it, and fits in their registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.hooked_mamba.ops_triton import compiled

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "hip:gfx942": 64 << 10}
"""Bytes a program may have: CUDA programming guide, table of technical specifications; for gfx942 the LDS."""
STACK = {"cuda:80": 16, "cuda:90": 0, "hip:gfx942": 0}
"""Bytes a lane may leave on the stack: on sm_80 the compiler puts a pair of addresses there."""
MOST_SLOTS = {
    "mamba1": {"mamba1_forward": 10.5, "mamba1_adjoint": 10.5, "mamba1_backward": 20.0},
    "gated": {"mamba1_forward": 13.5, "mamba1_adjoint": 12.0, "mamba1_backward": 25.5},
}
"""Issue slots per number of the state and position, at E=1536, N=16 and even lengths on sm_90."""
MOST_REGISTERS = {
    "mamba1_forward": 168, "mamba1_adjoint": 144, "mamba1_backward": 255, "join_kernel": 40,
    "ssd_gram": 80, "ssd_outer": 80, "ssd_pass": 40, "ssd_read_out": 144, "linear_forward": 80, "linear_backward": 80,
    "delta_forward": 112, "delta_backward": 255,
}  # fmt: skip
"""Registers per lane at the sizes of the core, on sm_90: with 168 a multiprocessor holds 12 warps, with 255 8."""
WHOLE_BACKWARD = 29.0
"""Slots of all loops that a backward of Mamba-1 in float32 goes through."""


@cache
def launches(target: str, names: tuple[str, ...]) -> dict[str, list[dict]]:
    """Compile cases in one process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.hooked_mamba.ops_triton.compiled", target, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {line["case"]: line["launches"] for line in map(json.loads, done.stdout.splitlines())}


def hold(target: str, found: list[dict]) -> None:
    """Next to no registers spilled, and no more shared memory than there is."""
    assert found
    for launch in found:
        assert launch["stack"] <= STACK[target], launch
        assert launch["shared"] <= SHARED_MEMORY[target], launch
        if target.startswith("cuda"):
            assert launch["local_loads"] * 4 <= STACK[target], launch


def hold_slots(name: str, found: list[dict]) -> None:
    """No loop longer than it was measured to be."""
    assert found
    for launch in found:
        assert max(launch["slots"]) <= MOST_SLOTS[name.split()[0]][launch["kernel"]], launch
        assert min(launch["slots"]) > 2, launch


SAME_KERNELS = ("mamba1 fp32 frozen", "mamba1 bf16")
"""Cases of the core whose kernels others compile as well."""


@pytest.mark.parametrize("without", [SAME_KERNELS, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_sm90(without: tuple[str, ...]) -> None:
    """All in one test, since one process compiles them all."""
    names = tuple(name for name in compiled.CORE if name not in without)
    of_cases = launches("cuda:90", names)
    assert set(of_cases) == set(names)
    for name, found in of_cases.items():
        hold("cuda:90", found)
        for launch in found:
            assert 0 < launch["registers"] <= MOST_REGISTERS[launch["kernel"]], launch
        if name.startswith(tuple(MOST_SLOTS)):
            hold_slots(name, [launch for launch in found if launch["slots"]])
    slots = [x["slots"] for x in of_cases["mamba1 fp32"] if x["kernel"] in ("mamba1_adjoint", "mamba1_backward")]
    assert [len(loops) for loops in slots] == [1, 2]
    assert sum(map(sum, slots)) <= WHOLE_BACKWARD


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled.MORE)
def test_sm90_more(name: str) -> None:
    hold("cuda:90", launches("cuda:90", tuple(compiled.MORE))[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled.CASES)
def test_sm80(name: str) -> None:
    hold("cuda:80", launches("cuda:80", tuple(compiled.CASES))[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled.CASES)
def test_gfx942(name: str) -> None:
    hold("hip:gfx942", launches("hip:gfx942", tuple(compiled.CASES))[name])
