"""Codestral-Mamba's own format."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from hooked_mamba.config import Mamba2Config
from hooked_mamba.loading import CheckpointError, codestral, load_checkpoint, save_checkpoint
from hooked_mamba.model.shapes import weight_shapes
from tests.hooked_mamba.loading import builders
from tests.hooked_mamba.loading.builders import assert_same


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2])
def test_round_trip_through_files(n_groups, tied, tmp_path):
    params, state = builders.codestral(n_groups, tied)
    (tmp_path / "params.json").write_text(json.dumps(params))
    save_file(state, tmp_path / "consolidated.safetensors")
    found = load_checkpoint(tmp_path)
    assert found.format == "codestral"
    assert found.cfg == Mamba2Config(
        d_model=64, n_layers=1, d_vocab=12, d_vocab_unpadded=12, d_state=128, head_dim=64, n_groups=n_groups,
        norm_groups=n_groups, dt_limit=(0.0, math.inf), chunk_size=256, tie_embeddings=tied,
        model_name=tmp_path.name,
    )  # fmt: skip
    assert {n: tuple(found.state_dict[n].shape) for n in found.state_dict} == weight_shapes(found.cfg)
    back_params, back = codestral.from_ours(found.cfg, found.state_dict)
    ignored = {"pad_vocab_size_multiple"}  # 12 rows are 12 rows, whatever they were padded by
    assert {n: v for n, v in back_params.items() if n not in ignored} == {
        n: v for n, v in params.items() if n not in ignored
    }
    if tied:
        state["model.lm_head.weight"] = state["model.backbone.embedding.weight"]
    assert_same(back, state)


def test_the_prefix_may_be_absent_but_not_both():
    params, state = builders.codestral()
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    assert set(codestral.to_ours(params, bare)[1]) == set(codestral.to_ours(params, state)[1])
    with pytest.raises(CheckpointError, match="with and without the prefix"):
        codestral.to_ours(params, state | bare)


def test_other_forms_in_the_same_folder(tmp_path):
    """The hub's repository holds Mistral's form and transformers' form side by side."""
    params, state = builders.codestral()
    (tmp_path / "params.json").write_text(json.dumps(params))
    save_file(state, tmp_path / "consolidated.safetensors")
    mistral = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, mistral.cfg, mistral.state_dict, format="hf")
    both = load_checkpoint(tmp_path)
    assert both.format == "hf_mamba2"
    assert both.cfg.n_groups == both.cfg.norm_groups == 2
    assert_same(both.state_dict, mistral.state_dict)
    (tmp_path / "model.safetensors").unlink()
    assert load_checkpoint(tmp_path).format == "codestral"


def test_mistrals_later_file_names(tmp_path):
    params, state = builders.codestral()
    (tmp_path / "config.json").write_text(json.dumps(params))
    save_file(state, tmp_path / "model.safetensors")
    found = load_checkpoint(tmp_path)
    assert found.format == "codestral"
    assert torch.equal(found.state_dict["unembed.weight"], state["model.lm_head.weight"])


def test_unsupported_fields_are_refused():
    params, state = builders.codestral()
    with pytest.raises(CheckpointError, match="rms_norm=False"):
        codestral.to_ours(params | {"rms_norm": False}, state)
    with pytest.raises(CheckpointError, match="'n_heads', which is not known"):
        codestral.to_ours(params | {"n_heads": 8}, state)
    with pytest.raises(CheckpointError, match="model_type='transformer'"):
        codestral.to_ours(params | {"model_type": "transformer"}, state)
    cfg, _ = codestral.to_ours(params, state)
    other = Mamba2Config.from_dict(cfg.to_dict() | {"d_conv": 3})
    with pytest.raises(CheckpointError, match="no field for d_conv"):
        codestral.from_ours(other, {})
