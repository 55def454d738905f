"""Models in several GGUF files, split by gguf's own writer."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch

from hooked_mamba import load_model
from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.files import resolve
from hooked_mamba.loading.gguf.parts import models_in
from tests.hooked_mamba.loading.gguf.small import mamba_file

NAMES = [f"model-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
SPLIT = {"split_max_tensors": 5}
IDS = torch.tensor([[1, 5, 2, 7, 7, 3]])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of three parts."""
    folder = tmp_path / "parts"
    folder.mkdir()
    mamba_file(folder / "model.gguf", **SPLIT)
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    return folder


@pytest.mark.parametrize("given", ["", *NAMES])
def test_any_part_and_the_folder_give_the_model_of_the_single_file(given: str, place: Path, tmp_path: Path) -> None:
    whole = load_model(mamba_file(tmp_path / "model.gguf"))
    found = load_model(place / given)
    with torch.no_grad():
        assert torch.equal(found(IDS), whole(IDS))
    assert found.cfg.model_name == ("model" if given else "parts")


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    mamba_file(tmp_path / "model.gguf", **SPLIT, small_first_shard=True)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 4
    with torch.no_grad():
        found = load_model(parts[2])(IDS)
        assert torch.equal(found, load_model(mamba_file(tmp_path / "single.gguf"))(IDS))


@pytest.mark.parametrize("given", ["", NAMES[1]])
def test_missing_parts_are_named(given: str, place: Path) -> None:
    (place / NAMES[0]).unlink()
    (place / NAMES[2]).unlink()
    with pytest.raises(CheckpointError, match=f"one of 3 files .* missing are {NAMES[0]}, {NAMES[2]}$"):
        load_model(place / given)


def test_parts_that_do_not_belong_together(place: Path, tmp_path: Path) -> None:
    second = (place / NAMES[1]).read_bytes()
    (place / NAMES[1]).write_bytes((place / NAMES[2]).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{NAMES[1]}: the key split\.no is 2; expected 1"):
        load_model(place)
    (place / NAMES[1]).write_bytes(second)
    other = tmp_path / "other"
    other.mkdir()
    mamba_file(other / "model.gguf", changed={"blk.0.ssm_d": None}, split_max_tensors=4)
    (place / NAMES[2]).write_bytes((other / NAMES[2]).read_bytes())
    with pytest.raises(CheckpointError, match=r"is both in|split\.tensors\.count is 12, and its 3 parts have"):
        load_model(place)
    (place / NAMES[0]).rename(place / "first.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 files .* expected names such as model-00001-of-00003\.gguf"):
        load_model(place / "first.gguf")


def test_several_models_in_a_folder(place: Path) -> None:
    mamba_file(place / "whole.gguf")
    with pytest.raises(CheckpointError, match=f"several GGUF files, {NAMES[0]}, whole.gguf; give"):
        load_model(place)
    assert models_in(["b.gguf", *NAMES, "x-00001-of-00002.gguf"]) == ["b.gguf", NAMES[0], "x-00001-of-00002.gguf"]


def test_all_parts_are_fetched_from_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: [*NAMES, "README.md"])
    assert resolve(f"owner/name/{NAMES[1]}") == place / NAMES[1]
    assert asked[-1] == ["model-*-of-00003.gguf"]
    assert resolve("owner/name") == place
    assert asked[-1] == ["model-*-of-00003.gguf"]
