"""Paths that lead nowhere are told as such, with what is near them, and never asked of the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from hooked_mamba.loading import CheckpointError
from hooked_mamba.local_paths import means_local, missing
from hooked_mamba.models import load_model


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    (tmp_path / "runs").mkdir()
    for name in ("model-q8.gguf", "other.gguf", "notes.txt", ".hidden.gguf"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("modl-q8.gguf", "near it in {}: model-q8.gguf"),
        ("zzz.gguf", "of its kind in {}: model-q8.gguf, other.gguf"),
        ("./run", "near it in {}: runs/"),
        ("~/run", "near it in {}: runs/"),
        ("./run/deep/model.pth", ": there is no folder run; near it in {}: runs/"),
        ("runs/model.safetensors", ""),
        (Path("runz"), "near it in {}: runs/"),
        ("/nowhere-at-all/x", ": there is no folder /nowhere-at-all"),
    ],
)
def test_a_path_that_does_not_exist(name, listed, place):
    with pytest.raises(CheckpointError) as error:
        load_model(name)
    assert str(error.value).startswith(f"{str(name)!r} does not exist")
    assert listed.format(place) in str(error.value)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("name", ["owner/name", "gpt2", "owner/model.gguf", "owner/name/q8/model.gguf"])
def test_names_of_the_hub_are_no_paths(name, place):
    assert not means_local(name)


def test_what_cannot_be_listed_is_left_out(place):
    assert missing("runs/x") == "'runs/x' does not exist"
