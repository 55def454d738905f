"""Ctrl-C while text is read, what is shown from the start, and a disk that is full in the midst of a training."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path

import pytest
import torch

from hooked_mamba import HookedMamba, MambaConfig
from hooked_mamba.durable import DiskFullError
from saes import SAE, sae_config
from saes.store import ActivationStore, DocumentRows, ListedDocuments
from saes.store.blocks import ModelBlocks
from saes.store.capture import Capture
from saes.training import TrainConfig, Trainer, checkpoint
from saes.training.checkpoint import steps_saved
from saes.training.loggers import JsonLines

SITE = "blocks.0.mixer.hook_out_proj"
TEXT = [[(7 * i + 3 * k) % 17 for k in range(8)] for i in range(40)]


class Interrupting(DocumentRows):
    """Rows; Ctrl-C comes with the n-th."""

    def __init__(self, at: int | None) -> None:
        super().__init__(ListedDocuments(TEXT), 8)
        self.at, self.given = at, 0

    def next_row(self):
        self.given += 1
        if self.given == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().next_row()


def trainer(out: Path | None, at: int | None = None, **options) -> Trainer:
    """Blocks of 64 positions, 8 passes each, a new one every other step."""
    model = HookedMamba(MambaConfig(d_model=8, n_layers=1, d_vocab=17, d_state=3), seed=0)
    store = ActivationStore(ModelBlocks(Capture(model, [SITE]), Interrupting(at), tokens=64, rows_per_pass=1), 32)
    config = TrainConfig(**{"steps": 8, "checkpoint_every": 4, "log_every": 2, "progress": False} | options)
    return Trainer({"sae": SAE(sae_config(SITE, 8, 16, k=2), seed=0)}, store, config, out=out)


@pytest.fixture
def foreground():
    """As in a terminal: a shell that starts a job in the background has it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_before_the_first_step_leaves_nothing_half_done(tmp_path, capsys):
    stopped = trainer(tmp_path, at=3)
    result = stopped.train()
    assert (result.step, result.complete) == (0, False)
    assert stopped.store.blocks.rows.given < 8, "the block is read to its end before anyone listens"
    assert steps_saved(tmp_path / "checkpoints") == []
    assert "stopping after this step; press Ctrl-C again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert trainer(tmp_path).train(resume=True).complete


@pytest.mark.parametrize("at", [9, 13, 20])
def test_ctrl_c_while_a_later_block_is_read_changes_nothing_in_the_end(tmp_path, at):
    whole = trainer(None).train()
    stopped = trainer(tmp_path, at=at)
    first = stopped.train()
    assert not first.complete
    assert first.step > 0
    assert stopped.store.blocks.rows.given <= at + 1
    assert steps_saved(tmp_path / "checkpoints")[-1] == first.step
    again = trainer(tmp_path).train(resume=True)
    assert again.complete
    for name, value in whole.coders["sae"].state_dict().items():
        assert torch.equal(again.coders["sae"].state_dict()[name], value), name


def test_reading_is_shown_before_the_first_step(capsys):
    trainer(None, progress=True).train()
    shown = capsys.readouterr().err
    stepped = re.search(r"\b[1-8]/8", shown)  # which steps the bar has time to show is up to the machine
    assert stepped is not None
    assert 0 <= shown.find("reading text 12%") < stepped.start()


def test_a_full_disk_at_a_checkpoint(tmp_path, monkeypatch):
    written = checkpoint.write_through

    def full(path, data):
        if path.name == "state.safetensors" and "step-00000008" in str(path):
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, data)

    monkeypatch.setattr(checkpoint, "write_through", full)
    with pytest.raises(DiskFullError, match=r"no room for [\d,]+ bytes of state\.safetensors") as error:
        trainer(tmp_path).train()
    assert error.value.filename == str(tmp_path / "checkpoints" / "step-00000008" / "state.safetensors")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert trainer(tmp_path).train(resume=True).complete


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(DiskFullError, match=r"bytes of metrics\.jsonl: No space left") as error:
        log.log(1, {"loss": 1.0})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    log.close()
