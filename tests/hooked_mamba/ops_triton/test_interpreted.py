"""Every Triton kernel against the naive loop in float64, values and gradients: interpreted, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.hooked_mamba.ops_triton import interpreted

CORE, MORE = tuple(interpreted.CORE), tuple(interpreted.MORE)
ROOT = Path(__file__).parents[3]
TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3}
"""By a word in the case's name; else float32's."""
TOLERANCE_FLOAT32 = 1e-5


@cache
def errors(device: str, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Run cases in one process, and take what it says of each."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    command = [sys.executable, "-m", "tests.hooked_mamba.ops_triton.interpreted", device, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["case"]: line["errors"] for line in lines}


def hold(name: str, found: dict[str, float]) -> None:
    """All errors within what the type allows."""
    assert found
    tolerance = next((t for word, t in TOLERANCE.items() if word in name), TOLERANCE_FLOAT32)
    if "repeats" in name:
        tolerance = 0.0
    beyond = {k: e for k, e in found.items() if not e <= tolerance}
    assert not beyond, f"{name}: errors beyond {tolerance}: {beyond}"


def test_interpreter() -> None:
    """All in one test, since one process runs them all."""
    found = errors("cpu", CORE)
    assert set(found) == set(CORE)
    for name in CORE:
        hold(name, found[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_interpreter_more(name: str) -> None:
    hold(name, errors("cpu", MORE)[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CORE + MORE)
def test_gpu(name: str) -> None:
    hold(name, errors("cuda", CORE + MORE)[name])
