"""The benchmark for GPUs runs at tiny shapes in the interpreter, and refuses to run on nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.benchmarks import gpu_scan

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu_scan"]


@pytest.mark.slow
def test_smoke() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*COMMAND, "--smoke"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "left out" not in done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")
    ]
    heads = [row for row in rows if "type" in row]
    assert len(heads) == 3
    for row in rows:
        if row[0].startswith("1 x 20") and len(row) == len(heads[0]) and row[2] in ("forward", "gated"):
            assert float(row[6]) < (1e-5 if row[1] == "fp32" else 2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit, match="2"):
        gpu_scan.main([])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_day_runs_dry(tmp_path: Path) -> None:
    command = ["bash", "tests/benchmarks/gpu_day.sh", "--dry-run", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    steps = (tmp_path / "steps.log").read_text().splitlines()
    assert [line.split(":")[0] for line in steps] == ["tests", "scan", "ssd", "model"]
    assert "| tiny |" in (tmp_path / "model.log").read_text()
