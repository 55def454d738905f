"""Work in pieces: shared, stopped, resumed and merged to what one process would have found."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hooked_mamba.pieces import Pieces, PiecesError, load_tensors, save_tensors
from hooked_mamba.world import World
from tests.saes import many

ROOT = Path(__file__).parents[2]


def squares(folder: Path, world: World | None = None, about: dict | None = None, stop: int = 99) -> list[int]:
    """Which pieces were done, each the square of its number."""
    did = []

    def work(piece: int, part: int) -> dict[str, torch.Tensor]:
        if len(did) == stop:
            raise KeyboardInterrupt
        did.append(piece)
        return {"square": torch.tensor([part * part])}

    Pieces(folder, about or {"of": "squares"}, world=world).run(range(7), work, progress=False)
    return did


def test_a_stopped_run_continues_with_any_number_of_processes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        squares(tmp_path, stop=2)
    with pytest.raises(PiecesError, match="not complete"):
        list(Pieces(tmp_path, {"of": "squares"}))
    (tmp_path / "piece-00004.safetensors").write_bytes(b"torn")  # without its .json it does not count
    alone = World()
    second = type("Second", (World,), {"wait": lambda self: None})(rank=1, size=2)
    with pytest.raises(PiecesError, match="not complete"):
        squares(tmp_path, world=second) and list(Pieces(tmp_path, {"of": "squares"}))
    assert squares(tmp_path, world=alone) == [2, 4, 6]  # the second did 3 and 5
    assert squares(tmp_path) == []
    assert load_tensors(tmp_path)["square"].tolist() == [i * i for i in range(7)]


def test_other_work_and_damage_are_refused_by_name(tmp_path: Path) -> None:
    squares(tmp_path)
    with pytest.raises(PiecesError, match="its of is 'squares', this one's 'cubes'"):
        squares(tmp_path, about={"of": "cubes"})
    path = tmp_path / "piece-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(PiecesError, match=r"piece-00003\.safetensors is damaged"):
        load_tensors(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["pieces"][0]["file"] = "../piece-00000.safetensors"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PiecesError, match="not a file of the folder itself"):
        load_tensors(tmp_path)


def test_prompts_are_sharded_and_read_back(tmp_path: Path) -> None:
    prompts = {"clean": torch.arange(70).reshape(10, 7), "answer": torch.arange(10)}
    save_tensors(tmp_path, prompts, rows=4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    back = load_tensors(tmp_path)
    assert all(torch.equal(back[name], value) for name, value in prompts.items())
    with pytest.raises(ValueError, match=re.escape("one number of rows")):
        save_tensors(tmp_path / "other", {"a": torch.zeros(2), "b": torch.zeros(3)})


def _command(out: Path, processes: int) -> tuple[list[str], dict[str, str]]:
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [sys.executable, *run, "tests.saes.many", str(out)], environment


@pytest.mark.slow
def test_a_killed_run_ends_equal(tmp_path: Path) -> None:
    command, environment = _command(tmp_path / "two", 2)
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while len(list((tmp_path / "two").rglob("*-0000*.json"))) < 5 and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not many.complete(tmp_path / "two")
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert many.equal(many.everything(tmp_path / "one"), many.everything(tmp_path / "two"))
