"""`hooked-mamba verify`: a saved checkpoint here and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hooked_mamba import verification
from hooked_mamba.cli.verify import default_file
from hooked_mamba.memory import available_bytes
from hooked_mamba.models import load_model
from tests.hooked_mamba.loading.folders import files_of, write
from tests.hooked_mamba.loading.packing import WAYS, quantise
from tests.hooked_mamba.saved import save_tiny
from tests.hooked_mamba.test_cli import call, complaint


@pytest.mark.parametrize("family", ["mamba", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_a_folder_agrees_with_transformers(tmp_path, family):
    save_tiny(tmp_path / "tiny", family)
    result = call("verify", tmp_path / "tiny", "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "They agree" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["agrees"]
    assert (found["name"], found["family"], found["reference"], found["left_out"]) == ("tiny", family, "files", {})
    assert [one["dtype"] for one in found["comparisons"]] == ["float32", "float64"]
    for one in found["comparisons"]:
        assert one["same_continuation"]
        assert one["same_top"] == 1
        assert 0 < one["max_difference"] + 1e-300 < 1e-5
        assert min(one["seconds_here"], one["seconds_transformers"]) > 0
    assert found["prompts"] == len(verification.PROMPTS)
    assert {"torch", "transformers"} <= set(found["versions"])


def test_a_difference_is_found(tmp_path, monkeypatch):
    """One weight of ours is changed."""

    def changed(*args, **kwargs):
        model = load_model(*args, **kwargs)
        with torch.no_grad():
            model.blocks[1].mixer.D[0] += 0.5
        return model

    monkeypatch.setattr(verification, "load_model", changed)
    save_tiny(tmp_path / "tiny")
    result = call("verify", tmp_path / "tiny", "--dtype", "float64", "--out", tmp_path / "found.json")
    assert result.exit_code == 1
    assert "They DIFFER" in result.output
    assert not json.loads((tmp_path / "found.json").read_text())["agrees"]


def test_the_file_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    assert default_file("tinystories-4l").name == "verify-tinystories-4l.json"
    assert default_file("owner/name").name == "verify-owner--name.json"
    assert default_file(str(tmp_path / "a b") + "/") == default_file("a b") == Path("verify-a--b.json")
    assert default_file(".").name == f"verify-{tmp_path.name}.json"


@pytest.mark.slow
def test_formats_that_transformers_does_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model(save_tiny(tmp_path / "tiny"))
    model.tokenizer = None
    model.save_pretrained(tmp_path / "raw", format="raw")
    result = call("verify", tmp_path / "raw", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "verify-raw.json").read_text())
    assert (found["reference"], found["prompts"]) == ("converted", 0)


@pytest.mark.parametrize(
    "way",
    ["GPTQ", "fp8", *(pytest.param(w, marks=pytest.mark.slow) for w in ("bitsandbytes 8-bit", "compressed-tensors"))],
)
def test_quantised_files(tmp_path, way):
    """Whether the package that packed them is installed or not."""
    name = "backbone.layers.0.mixer.in_proj"
    config, packed, _, _ = quantise(WAYS[way], *files_of("Mamba"), [name])
    result = call("verify", write(tmp_path / "packed", config, packed), "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "found.json").read_text())["agrees"]


@pytest.mark.slow
def test_what_does_not_fit_is_left_out(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    assert available_bytes(torch.device("cpu")) is not None
    monkeypatch.setattr(verification, "available_bytes", lambda device: 12_000)
    found = verification.verify(tmp_path / "tiny", repeats=1)
    assert [one.dtype for one in found.comparisons] == ["float32"]
    assert "do not fit" in found.left_out["float64"]
    monkeypatch.setattr(verification, "available_bytes", lambda device: 1)
    assert "nothing was compared" in complaint(call("verify", tmp_path / "tiny", "--out", tmp_path / "f.json"))
    assert "dtypes must be of float32, float64" in complaint(call("verify", tmp_path / "tiny", "--dtype", "float16"))
