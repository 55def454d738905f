"""Two processes under torchrun (gloo): the same weights in both, and those of one process with the double batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saes.training import World, local_device
from tests.saes import many
from tests.saes.training import parallel

ROOT = Path(__file__).parents[3]


def two_processes(out: Path, mode: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    ran = subprocess.run(
        [*command, "tests.saes.training.parallel", str(out), mode],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return tuple(load_file(out / f"{mode}-{rank}.safetensors") for rank in (0, 1))  # type: ignore[return-value]


def test_two_processes_train_as_one_with_the_double_batch_and_find_in_pieces_what_one_does(tmp_path: Path) -> None:
    first, second = two_processes(tmp_path, "halves")
    alone = parallel.equal_halves(World())
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        coder, _, parameter = name.partition(".")
        torch.testing.assert_close(value, alone[coder].state_dict()[parameter], rtol=1e-4, atol=1e-5)
    untrained = parallel.coders()["topk"].W_dec
    assert (untrained - first["topk.W_dec"]).abs().max() > 1e-2
    assert many.complete(tmp_path / "pieces")
    assert many.equal(many.everything(tmp_path / "alone"), many.everything(tmp_path / "pieces"))


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [local_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:3", "cuda:1"]


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    first, second = two_processes(tmp_path, "text")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    again, _ = two_processes(tmp_path, "resume")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
