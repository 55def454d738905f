"""Options of a training: checked, with near names, from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saes.options import OptionError, read_file
from saes.store import DataConfig
from saes.training import RunConfig, TrainConfig


def test_schedules() -> None:
    config = TrainConfig(steps=100, warmup=0.1, decay=0.2, sparsity=2.0, sparsity_warmup=0.5)
    factors = [config.lr_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert [config.sparsity_at(step, 100) for step in (0, 24, 49, 99)] == pytest.approx([0.04, 1.0, 2.0, 2.0])
    flat = TrainConfig.from_dict({"steps": 100, "warmup": 0, "decay": 0, "sparsity": 1, "sparsity_warmup": 0})
    assert {flat.lr_factor(step, 100) for step in range(100)} == {1.0}
    assert flat.sparsity_at(0, 100) == 1.0


def test_length_and_learning_rate() -> None:
    assert TrainConfig(n_tokens=1000).n_steps(300) == 4
    assert TrainConfig(steps=7).n_steps(300) == 7
    assert TrainConfig(steps=1).highest_lr(16384) == pytest.approx(6e-4)
    assert TrainConfig(steps=1).highest_lr(4096) == pytest.approx(1.2e-3)
    assert TrainConfig(steps=1, lr=0.1).highest_lr(4096) == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give n_tokens= or steps="),
        ({"steps": 1, "n_tokens": 1}, "give n_tokens= or steps="),
        ({"steps": 0}, "steps must be a whole number at least 1, got 0"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 1, "lr": -1}, "lr must be a number at least 0, got -1"),
        ({"steps": 1, "lr": float("nan")}, "lr must be a number"),
        ({"steps": 1, "decay": 1.1}, "decay must be a number from 0 to 1"),
        ({"steps": 1, "b_dec": "men"}, "b_dec must be one of 'mean', 'median', 'zero', got 'men'; nearest: mean"),
        ({"steps": 1, "autocast": "float16"}, "nearest: bfloat16"),
        ({"steps": 1, "weight_decay": 0.1}, "TrainConfig has no option 'weight_decay'"),
        ({"steps": 1, "grad_clp": 1}, "no option 'grad_clp'; nearest: grad_clip"),
    ],
)
def test_wrong_options(values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_sze": 3}, "nearest: batch_size"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"folder": "x"}, "belong together"),
        ({"block_tokens": 10}, "must be at least batch_size"),
    ],
)
def test_wrong_data_options(values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DataConfig.from_dict(values)


RUN = {"model": "m", "text": "t.txt", "out": "o", "coders": [{"layer": 1, "d_sae": 8}], "train": {"steps": 3}}
TOML = """
model = "m"
text = "t.txt"
out = "o"
[[coders]]
layer = 1
d_sae = 8
[train]
steps = 3
"""


def test_files(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(TOML)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert RunConfig.from_file(tmp_path / "run.toml") == RunConfig.from_file(tmp_path / "run.json")
    (tmp_path / "train.toml").write_text("steps = 3\nlr = 0.01\n")
    assert TrainConfig.from_file(tmp_path / "train.toml") == TrainConfig(steps=3, lr=0.01)
    assert TrainConfig.from_dict(TrainConfig(steps=3).to_dict()) == TrainConfig(steps=3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "steps: 3", "must end in .json or .toml"),
        ("a.toml", "steps = ", "is no TOML"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[1]", "must hold a mapping"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "m"}, "RunConfig has no option 'modle'; nearest: model"),
        ({"train": {"steps": 3, "lrr": 1}}, "TrainConfig has no option 'lrr'"),
        ({"data": {"sed": 1}}, "DataConfig has no option 'sed'; nearest: seed"),
        ({"coders": [{"layer": 1, "d_sea": 8}]}, "a coder has no option 'd_sea'; nearest: d_sae"),
        ({"coders": [{"layer": 1}]}, "a coder lacks d_sae"),
        ({"coders": []}, "coders is empty"),
    ],
)
def test_unknown_keys_at_any_depth(changes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RunConfig.from_dict({**RUN, **changes})
    with pytest.raises(OptionError, match="RunConfig lacks text"):
        RunConfig.from_dict({k: v for k, v in RUN.items() if k != "text"})
