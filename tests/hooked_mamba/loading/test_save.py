"""Written checkpoints: read back by transformers, and whole or absent."""

import dataclasses
import json
import os

import pytest
import torch
import transformers
from safetensors import safe_open

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading import CheckpointError, from_hf_model, load_checkpoint, save, save_checkpoint
from hooked_mamba.loading.weights import float32_names
from hooked_mamba.model.hooked_model import model_class
from hooked_mamba.model.shapes import weight_shapes
from tests.hooked_mamba.loading.builders import HF_KINDS, assert_same, random_hf_model, stored_dtype


def small(**fields):
    cfg = MambaConfig(d_model=16, n_layers=2, d_vocab=24, **fields)
    generator = torch.Generator().manual_seed(0)
    return cfg, {n: torch.randn(shape, generator=generator) for n, shape in weight_shapes(cfg).items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind in HF_KINDS for seed in range(3)])
def test_transformers_reads_what_was_saved(kind, seed, shard_bytes, tmp_path):
    theirs = random_hf_model(kind, seed)
    cfg, state = from_hf_model(theirs)
    save_checkpoint(tmp_path / "model", cfg, state, shard_bytes=shard_bytes)
    back, report = type(theirs).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert_same(back.state_dict(), theirs.state_dict())
    assert (back.lm_head.weight is back.get_input_embeddings().weight) == cfg.tie_embeddings
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(back.eval()(tokens).logits, theirs(tokens).logits)
    again = load_checkpoint(tmp_path / "model")
    assert again.cfg == dataclasses.replace(cfg, model_name="model")
    assert_same(again.state_dict, state)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_what_transformers_saved_is_read_the_same_from_its_files(kind, tmp_path):
    theirs = random_hf_model(kind, 6)
    theirs.save_pretrained(tmp_path / "model")
    cfg, state = from_hf_model(theirs)
    found = load_checkpoint(tmp_path / "model")
    assert found.cfg == dataclasses.replace(cfg, model_name="model")
    assert_same(found.state_dict, state)


def test_the_class_is_found_by_transformers_auto_classes(tmp_path):
    save_checkpoint(tmp_path / "model", *small())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model) is transformers.MambaForCausalLM


def test_shards_stay_below_the_limit_and_hold_everything(tmp_path):
    cfg, state = small()
    save_checkpoint(tmp_path / "model", cfg, state, shard_bytes=8000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    for name in files:
        with safe_open(str(tmp_path / "model" / name), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 8000
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert_same(load_checkpoint(tmp_path / "model").state_dict, state)


def test_dtype(tmp_path):
    cfg, state = small()
    float32 = float32_names(model_class(cfg).empty(cfg))
    save_checkpoint(tmp_path / "model", cfg, state, dtype=torch.bfloat16, float32=float32)
    found = load_checkpoint(tmp_path / "model")
    assert found.dtype == torch.bfloat16
    kept = {name for name in found.state_dict if found.state_dict[name].dtype == torch.float32}
    assert kept == {f"blocks.{i}.mixer.{n}" for i in range(2) for n in ("A_log", "D", "dt_proj.bias")}
    assert torch.equal(found.state_dict["embed.weight"], state["embed.weight"].bfloat16())
    assert stored_dtype(transformers.AutoConfig.from_pretrained(tmp_path / "model")) == torch.bfloat16


def test_a_step_limit_without_an_upper_end(tmp_path):
    cfg = Mamba2Config(d_model=16, n_layers=1, d_vocab=9, head_dim=8, d_state=4, dt_limit=(0.01, float("inf")))
    state = {name: torch.randn(shape) for name, shape in weight_shapes(cfg).items()}
    save_checkpoint(tmp_path / "model", cfg, state)
    assert load_checkpoint(tmp_path / "model").cfg.dt_limit == cfg.dt_limit
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "model").time_step_limit
    assert tuple(theirs) == cfg.dt_limit


def test_views_are_written_without_what_they_are_a_view_of(tmp_path):
    cfg, state = small()
    whole = torch.randn(500, 24, 16)
    state["embed.weight"] = whole[7]
    state["ln_final.weight"] = torch.randn(16, 3)[:, 1]  # not contiguous
    for form in ("hf", "raw"):
        save_checkpoint(tmp_path / form, cfg, state, format=form)
        assert sum(path.stat().st_size for path in (tmp_path / form).iterdir()) < whole.nbytes / 2
        assert_same(load_checkpoint(tmp_path / form).state_dict, state)


def test_a_folder_that_is_there_is_renewed_and_the_rest_of_it_kept(tmp_path):
    folder = tmp_path / "model"
    cfg, state = small()
    save_checkpoint(folder, cfg, state, shard_bytes=3000)
    (folder / "tokenizer.json").write_text("{}")
    other = {name: tensor + 1 for name, tensor in state.items()}
    save_checkpoint(folder, cfg, other)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same(load_checkpoint(folder).state_dict, other)
    save_checkpoint(folder, cfg, state, format="raw")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert load_checkpoint(folder).format == "raw_mamba"
    assert_same(load_checkpoint(folder).state_dict, state)


def test_a_checkpoint_may_be_saved_over_itself(tmp_path):
    cfg, state = small()
    save_checkpoint(tmp_path / "model", cfg, state)
    found = load_checkpoint(tmp_path / "model")
    save_checkpoint(tmp_path / "model", found.cfg, found.state_dict)
    assert_same(load_checkpoint(tmp_path / "model").state_dict, state)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("failing", ["_write_json", "_sync"])
def test_a_crash_leaves_the_old_or_nothing(exists, failing, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    cfg, state = small()
    if exists:
        save_checkpoint(folder, cfg, state)

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(save, failing, crash)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(folder, cfg, {name: tensor + 1 for name, tensor in state.items()})
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if exists else [])
    if exists:
        assert_same(load_checkpoint(folder).state_dict, state)


@pytest.mark.skipif(os.name == "nt", reason="modes of Unix")
def test_others_may_read_it_as_far_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_checkpoint(tmp_path / "model", *small())
    finally:
        os.umask(before)
    assert oct((tmp_path / "model").stat().st_mode & 0o777) == "0o755"


def test_refusals(tmp_path):
    cfg, state = small()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        save_checkpoint(tmp_path / "file", cfg, state)
    with pytest.raises(ValueError, match="expected 'hf' or 'raw'"):
        save_checkpoint(tmp_path / "x", cfg, state, format="onnx")
    with pytest.raises(CheckpointError, match=r"1 fault:\n  unexpected: extra \(1,\)"):
        save_checkpoint(tmp_path / "x", cfg, state | {"extra": torch.zeros(1)}, shapes=weight_shapes(cfg))
    odd, odd_state = small(d_inner=24)
    with pytest.raises(CheckpointError, match="whole multiples of d_model"):
        save_checkpoint(tmp_path / "x", odd, odd_state)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
