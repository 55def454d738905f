"""Telling formats and families apart."""

import json

import pytest
import torch

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading import CheckpointError, load_checkpoint
from hooked_mamba.loading.registry import FORMATS, detect, format_for
from tests.hooked_mamba.loading.builders import random_raw


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "mamba", "hidden_size": 8}, "hf_mamba"),
        ({"model_type": "mamba2", "hidden_size": 8}, "hf_mamba2"),
        ({"model_type": "falcon_mamba", "hidden_size": 8}, "hf_falcon_mamba"),
        # the early conversions on the hub carry both sets of names
        ({"model_type": "mamba", "hidden_size": 8, "d_model": 8, "n_layer": 1, "ssm_cfg": {}}, "hf_mamba"),
        ({"d_model": 8, "n_layer": 1}, "raw_mamba"),
        ({"d_model": 8, "ssm_cfg": None}, "raw_mamba"),
        ({"d_model": 8, "ssm_cfg": {"layer": "Mamba1"}}, "raw_mamba"),
        ({"d_model": 8, "ssm_cfg": {"layer": "Mamba2"}}, "raw_mamba2"),
        ({"dim": 8, "n_layers": 1, "n_groups": 8, "model_type": "mamba"}, "codestral"),
        ({"model_type": "mamba2"}, "hf_mamba2"),
    ],
)
def test_detect(config, name):
    assert detect(config) is FORMATS[name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba3", "hidden_size": 8}, "'mamba3' is not supported.*did you mean 'mamba"),
        ({"model_type": "bamba", "hidden_size": 8}, "expected one of mamba, mamba2, falcon_mamba"),
        ({"hidden_size": 8}, "model_type None"),
        ({"d_model": 8, "ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg layer 'Mamba3'.*expected one of Mamba1, Mamba2"),
        ({"dim": 8, "n_heads": 4}, "no known format: it has dim, n_heads"),
        ({}, "no fields"),
    ],
)
def test_unknown_formats(config, message):
    with pytest.raises(CheckpointError, match=message):
        detect(config)


def test_families(tmp_path):
    config, state = random_raw("raw_mamba2", 0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = load_checkpoint(tmp_path, family="mamba2")
    assert found.family == "mamba2"
    assert isinstance(found.cfg, Mamba2Config)
    assert found.dtype == torch.float32
    assert found.cfg.model_name == tmp_path.name
    with pytest.raises(CheckpointError, match=r"HookedMamba2\.from_pretrained instead of HookedMamba\.from_pretrained"):
        load_checkpoint(tmp_path, family="mamba")
    with pytest.raises(ValueError, match="no family 'mamba3'"):
        load_checkpoint(tmp_path, family="mamba3")


def test_every_config_has_a_format_to_be_written_in():
    small = {"d_model": 8, "n_layers": 1, "d_vocab": 8}
    one, falcon = MambaConfig(**small), MambaConfig(**small, mixer_norms=True)
    two = Mamba2Config(**small, head_dim=4)
    assert [format_for(cfg, "hf").name for cfg in (one, falcon, two)] == ["hf_mamba", "hf_falcon_mamba", "hf_mamba2"]
    assert [format_for(cfg, "raw").name for cfg in (one, two)] == ["raw_mamba", "raw_mamba2"]
    with pytest.raises(ValueError, match="expected 'hf' or 'raw'"):
        format_for(one, "gguf")


def test_the_wrong_norms_for_a_format():
    small = {"d_model": 8, "n_layers": 1, "d_vocab": 8}
    with pytest.raises(CheckpointError, match="is a Falcon-Mamba"):
        FORMATS["hf_mamba"].from_ours(MambaConfig(**small, mixer_norms=True), {})
    with pytest.raises(CheckpointError, match="is a plain Mamba"):
        FORMATS["hf_falcon_mamba"].from_ours(MambaConfig(**small), {})
