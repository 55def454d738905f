"""The trainer: it learns, trains many coders as it would each alone, and continues bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from saes.coder import SparseCoder
from saes.config import sae_config
from saes.store import ActivationStore, MemoryBlocks
from saes.training import ResumeError, Trainer, TrainResult
from saes.training.checkpoint import steps_saved
from tests.saes.training import small

SITE = "blocks.1.mixer.hook_out_proj"


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v for n, coder in result.coders.items() for k, v in coder.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """How coders are written is another part's business."""

    def save(self: SparseCoder, folder: Path, **options: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "saved").write_text(self.cfg.input_norm)
        return folder

    monkeypatch.setattr(SparseCoder, "save", save)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], str]:
    """An uninterrupted training: folder, final weights, log."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseCoder, "save", lambda self, folder, **options: folder)
        result = small.train(out)
    assert result.complete
    return out, weights(result), (out / "metrics.jsonl").read_text()


def test_it_learns_a_planted_dictionary() -> None:
    coder = SparseCoder(sae_config(SITE, 12, 48, k=4), seed=1)
    store = ActivationStore(small.planted(), 256)
    config = small.config(steps=300, lr=1e-2, log_every=20, aux_alpha=1 / 32)
    result = Trainer({"sae": coder}, store, config).train()
    assert result.measured["sae"]["ev"] > 0.85
    assert result.measured["sae"]["l0"] <= 4
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(48))


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_thresholds_are_calibrated_in_the_end(architecture: str) -> None:
    """On average k latents are active, as in training."""
    coder = SparseCoder(sae_config(SITE, 12, 48, k=4, architecture=architecture, input_norm="scale"), seed=1)
    blocks = small.planted()
    Trainer({"sae": coder}, ActivationStore(blocks, 256), small.config(steps=30)).train()
    active = (coder.encode(blocks.values[SITE]) != 0).sum(1).float().mean()
    assert 3.8 < active < 4.2


def test_many_coders_train_as_each_alone(whole) -> None:
    for name in ("topk", "batchtopk", "jumprelu"):
        coder = small.coders()[name]
        everything = small.store(small.coders())
        alone = Trainer({name: coder}, everything, small.config()).train()
        mine = {key: value for key, value in whole[1].items() if key.startswith(f"{name}.")}
        assert_same(weights(alone), mine)


@pytest.mark.parametrize("steps", [3, 11, 20])
def test_a_resumed_training_goes_on_bit_for_bit(tmp_path: Path, whole, steps: int) -> None:
    """Stopped after some steps, by a checkpoint there or up to three steps before."""
    named = small.coders()
    trainer = Trainer(named, small.store(named), small.config(), out=tmp_path)
    sample = trainer.store.sample(trainer.config.init_tokens)
    torch.manual_seed(trainer.config.seed)
    for run in trainer.runs.values():
        x, y = (sample[name] for name in _streams(run.coder))
        run.start(x, y)
    for _ in range(steps):
        trainer.take_step(next(trainer.store))
    trainer.save()
    torch.manual_seed(999)
    result = small.train(tmp_path, resume=True)
    assert result.complete
    assert_same(weights(result), whole[1])


def _streams(coder: SparseCoder) -> tuple[str, str]:
    from saes.targets import streams_of

    return streams_of(coder.cfg)


def test_resumed_logs_are_the_whole_ones(tmp_path: Path, whole) -> None:
    named = small.coders()
    store = small.store(named)
    taken = 0

    class Ends(ActivationStore):
        def __next__(self):
            nonlocal taken
            taken += 1
            if taken > 13:
                raise StopIteration
            return super().__next__()

    ends = Ends(store.blocks, store.batch_size)
    result = Trainer(named, ends, small.config(), out=tmp_path).train()
    assert (result.complete, result.step, result.ended) == (False, 13, "text")
    assert result.ending() == "the text ended at step 13 of 24"
    assert (tmp_path / "coders" / "jumprelu" / "saved").exists(), "finished as far as it came"
    leftover = tmp_path / "coders" / ".topk.0123.tmp"
    leftover.mkdir(parents=True)
    result = small.train(tmp_path, resume=True)
    assert not leftover.exists(), "what a kill left while coders were written"
    assert result.complete
    assert_same(weights(result), whole[1])
    assert (tmp_path / "metrics.jsonl").read_text() == whole[2]
    assert (tmp_path / "coders" / "jumprelu" / "saved").read_text() == "none", "scales are folded in"


@pytest.mark.parametrize("log_every", [1, 5, 50])
def test_text_that_ends_early_leaves_finished_coders(tmp_path: Path, monkeypatch, log_every: int) -> None:
    """With the figures of the last steps and thresholds of the last batch, again when the end is met again."""
    told: list[dict] = []

    def save(self: SparseCoder, folder: Path, **options: object) -> Path:
        told.append({**options, "threshold": float(self.threshold)})
        return folder

    monkeypatch.setattr(SparseCoder, "save", save)

    def ended(resume: bool) -> tuple[TrainResult, SparseCoder]:
        coder = SparseCoder(sae_config(SITE, 12, 48, k=4, architecture="batchtopk"), seed=1)
        store = ActivationStore(MemoryBlocks(small.planted(64 * 7).values, epochs=1), 64)
        config = small.config(steps=30, log_every=log_every)
        return Trainer({"sae": coder}, store, config, out=tmp_path).train(resume=resume), coder

    result, coder = ended(False)
    assert (result.step, result.n_steps, result.complete, result.ended) == (7, 30, False, "text")
    assert told[0]["training"] == {
        "tokens": 448,
        "steps": 7,
        "steps_asked": 30,
        "metrics_from": "the last training batches",
    }
    assert told[0]["metrics"].keys() == {"ev", "l0", "dead_share"}
    values = small.planted(64 * 7).values[SITE]
    assert 3.2 < (coder.encode(values) != 0).sum(1).float().mean() < 4.8, "calibrated"
    ended(True)
    assert told[1] == told[0]


def test_the_log(whole) -> None:
    rows = [json.loads(line) for line in whole[2].splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 24]
    assert rows[-1]["tokens"] == 24 * 64
    assert rows[0].keys() == rows[-1].keys()
    kinds = {key.split("/")[1] for key in rows[0] if "/" in key}
    assert kinds == {"loss", "ev", "l0", "aux", "dead"}
    assert rows[-1]["topk/ev"] > rows[0]["topk/ev"]
    assert rows[-1]["topk/l0"] <= 4


def test_checkpoints_are_kept_to_a_number(whole) -> None:
    assert steps_saved(whole[0] / "checkpoints") == [20, 24]


def test_finished_trainings_resume_to_their_end(whole) -> None:
    result = small.train(whole[0], resume=True)
    assert result.complete
    assert_same(weights(result), whole[1])
    assert result.measured["topk"]["ev"] > 0


def test_nothing_is_overwritten_by_accident(whole) -> None:
    with pytest.raises(FileExistsError, match="resume=True"):
        small.train(whole[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, r"train\.lr = 0\.003, this run 0\.001"),
        ({"steps": 30}, r"train\.steps = 24, this run 30"),
    ],
)
def test_other_options_cannot_resume(whole, changes: dict, message: str) -> None:
    with pytest.raises(ResumeError, match=message):
        small.train(whole[0], resume=True, **changes)


def test_options_younger_than_a_checkpoint_had_their_defaults(tmp_path: Path, whole) -> None:
    last = tmp_path / "checkpoints" / "step-00000024"
    shutil.copytree(whole[0] / "checkpoints" / last.name, last)
    about = json.loads((last / "state.json").read_text())
    del about["train"]["b_dec"]
    (last / "state.json").write_text(json.dumps(about))
    assert small.train(tmp_path, resume=True).complete
    with pytest.raises(ResumeError, match=r"train\.b_dec = 'mean', this run 'zero'"):
        small.train(tmp_path, resume=True, b_dec="zero")


def test_other_data_and_coders_cannot_resume(whole) -> None:
    named = small.coders()
    other = small.store(named)
    other = ActivationStore(other.blocks, other.batch_size, seed=1)
    with pytest.raises(ResumeError, match="other data"):
        Trainer(named, other, small.config(), out=whole[0]).train(resume=True)
    del named["gated"]
    with pytest.raises(ResumeError, match=r"coders\.gated"):
        Trainer(named, small.store(small.coders()), small.config(), out=whole[0]).train(resume=True)


def test_how_often_is_logged_and_saved_may_change(tmp_path: Path, whole) -> None:
    shutil.copytree(whole[0] / "checkpoints" / "step-00000020", tmp_path / "checkpoints" / "step-00000020")
    assert_same(weights(small.train(tmp_path, resume=True, checkpoint_every=1, log_every=1, keep=9)), whole[1])
    assert steps_saved(tmp_path / "checkpoints") == [20, 21, 22, 23, 24]


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    values = torch.randn(200, 12)
    values[150] = 1e30  # squares overflow
    store = ActivationStore(MemoryBlocks({SITE: values}), 20)
    coder = SparseCoder(sae_config(SITE, 12, 24, k=2), seed=0)
    trainer = Trainer({"sae": coder}, store, small.config(steps=50, checkpoint_every=1, init_tokens=20), out=tmp_path)
    with pytest.raises(FloatingPointError, match="the loss of sae is no longer finite"):
        trainer.train()
    for path in (tmp_path / "checkpoints").glob("step-*/state.safetensors"):
        from safetensors.torch import load_file

        assert all(torch.isfinite(value.double()).all() for value in load_file(path).values())


@pytest.mark.parametrize(
    ("coders", "message"),
    [
        ({}, "no coder"),
        ({"a/b": sae_config(SITE, 12, 24, k=2)}, "must be letters"),
        ({"a": sae_config("blocks.0.mixer.hook_out_proj", 12, 24, k=2)}, "a needs blocks.0.* does not hold"),
        ({"a": sae_config(SITE, 13, 24, k=2)}, "to have width 13, the store has it in 12"),
    ],
)
def test_coders_must_fit_the_store(coders: dict, message: str) -> None:
    store = ActivationStore(small.planted(), 64)
    with pytest.raises(ValueError, match=message):
        Trainer({name: SparseCoder(cfg) for name, cfg in coders.items()}, store, small.config())


def test_resume_without_checkpoints() -> None:
    store = ActivationStore(small.planted(), 64)
    coder = SparseCoder(sae_config(SITE, 12, 24, k=2), seed=0)
    with pytest.raises(FileNotFoundError, match="no folder"):
        Trainer({"a": coder}, store, small.config()).resume()
    with pytest.raises(ValueError, match="needs a folder"):
        Trainer({"a": coder}, store, small.config(), loggers=["wandb"])


def test_the_progress_bar_says_how_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    small.train(None, progress=True, steps=10)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    for part in ("loss", "L0", "EV", "least", "dead"):
        assert part in shown
