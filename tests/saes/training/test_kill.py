"""kill -9 at random moments, Ctrl-C, and writes that fail midway."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hooked_mamba import durable
from saes.training import ResumeError, World
from saes.training.checkpoint import load_checkpoint, save_checkpoint, steps_saved

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def killed(out: Path, kills: int, seed: int, *more: str) -> dict:
    command = [sys.executable, "-m", "tests.saes.training.killing", str(out), f"--kills={kills}", f"--seed={seed}"]
    ran = subprocess.run([*command, *more], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_training_killed_twice_ends_as_one_that_was_not(tmp_path: Path) -> None:
    result = killed(tmp_path, 2, 0, "--quick")
    assert result["kills"] == 2
    assert result["files"] >= 4
    assert result["differs"] == []


@pytest.mark.slow
def test_a_training_killed_at_thirty_random_moments(tmp_path: Path) -> None:
    result = killed(tmp_path, 30, 1)
    assert result["kills"] == 30
    assert len(set(result["went_on_from"])) > 5, "the kills must hit different moments"
    assert result["differs"] == []


STOPPED = """
import json, sys
from pathlib import Path
import torch
from tests.saes.training import small
torch.set_num_threads(1)
out = Path(sys.argv[1])
print("started", flush=True)
result = small.train(out, steps=100_000, checkpoint_every=50_000, only=("topk",))
print(json.dumps([result.step, result.complete]), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_with_a_clean_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    step, complete = json.loads(out)
    assert process.returncode == 0
    assert not complete
    assert step > 0
    assert steps_saved(tmp_path / "checkpoints") == [step]
    assert load_checkpoint(tmp_path / "checkpoints", World())[1]["step"] == step


def save(folder: Path, step: int, keep: int = 2) -> None:
    save_checkpoint(folder, step, {"a": torch.full((3,), float(step))}, {"x": step}, {}, world=World(), keep=keep)


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    write = durable.write_through

    def fails(path: Path, data: bytes) -> None:
        if path.name == "state.json":
            raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("saes.training.checkpoint.write_through", fails)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert steps_saved(tmp_path) == [1]
    tensors, about, _ = load_checkpoint(tmp_path, World())
    assert tensors["a"].tolist() == [1.0] * 3
    assert about["x"] == 1
    save(tmp_path, 2)
    assert steps_saved(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert steps_saved(tmp_path) == [2, 3]
    assert load_checkpoint(tmp_path, World(), 2)[1]["x"] == 2
    with pytest.raises(FileNotFoundError, match=r"of step 1 .*there are \[2, 3\]"):
        load_checkpoint(tmp_path, World(), 1)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "none", World())


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "process-0.json"])
def test_damaged_checkpoints_say_so(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResumeError, match="is damaged"):
        load_checkpoint(tmp_path, World())
    shutil.rmtree(tmp_path / "step-00000001")


def test_another_number_of_processes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ResumeError, match="is of 1 processes, this run has 2"):
        load_checkpoint(tmp_path, World(0, 2))
