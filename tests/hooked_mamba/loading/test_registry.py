"""Telling formats and families apart."""

import json
import math

import pytest
import torch

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading import CheckpointError, load_checkpoint
from hooked_mamba.loading.registry import FORMATS, detect, format_for
from hooked_mamba.model.shapes import weight_shapes
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
        ({"model_type": "mamba9", "hidden_size": 8}, "'mamba9' is not supported.*did you mean 'mamba"),
        ({"model_type": "mixtral", "hidden_size": 8}, "expected one of mamba, mamba2, falcon_mamba"),
        ({"hidden_size": 8}, "model_type None"),
        ({"d_model": 8, "ssm_cfg": {"layer": "Mamba9"}}, "ssm_cfg layer 'Mamba9'.*expected one of Mamba1, Mamba2"),
        ({"dim": 8, "n_heads": 4}, "no known format: it has dim, n_heads"),
        ({}, "no fields"),
    ],
)
def test_unknown_formats(config, message):
    with pytest.raises(CheckpointError, match=message):
        detect(config)


RAW_MAMBA2 = {
    "d_model": 768,
    "d_intermediate": 0,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
"""The config.json of state-spaces/mamba2-130m."""


def test_published_configs():
    """Sizes of checkpoints people load, from the config files they come with."""
    found = detect(RAW_MAMBA2)
    cfg, _ = found.to_ours(RAW_MAMBA2, {})
    assert found.name == "raw_mamba2"
    assert (cfg.E, cfg.H, cfg.P, cfg.G, cfg.d_state, cfg.d_vocab) == (1536, 24, 64, 1, 128, 50288)
    assert weight_shapes(cfg)["blocks.23.mixer.in_proj.weight"] == (3352, 768)

    mamba = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    cfg, _ = detect(mamba).to_ours(mamba, {})
    assert (cfg.E, cfg.R, cfg.d_state, cfg.d_vocab) == (5120, 160, 16, 50280)
    total = sum(math.prod(shape) for shape in weight_shapes(cfg).values())
    assert 2.7e9 < total < 2.8e9

    codestral = {"dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "tie_embeddings": False}
    cfg, _ = detect(codestral).to_ours(codestral, {})
    assert (cfg.E, cfg.H, cfg.G, cfg.norm_groups) == (8192, 128, 8, 8)
    total = sum(math.prod(shape) for shape in weight_shapes(cfg).values())
    assert 7.2e9 < total < 7.3e9  # "7,285,403,648 parameters"

    falcon = {"model_type": "falcon_mamba", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024}
    falcon |= {"state_size": 16, "time_step_rank": 256, "tie_word_embeddings": False, "mixer_rms_eps": 1e-6}
    cfg, _ = detect(falcon).to_ours(falcon, {})
    assert (cfg.E, cfg.R, cfg.mixer_norms, cfg.tie_embeddings) == (8192, 256, True, False)
    total = sum(math.prod(shape) for shape in weight_shapes(cfg).values())
    assert 7.2e9 < total < 7.35e9


def test_hybrids_are_refused_by_what_makes_them_so():
    attention = RAW_MAMBA2 | {"attn_layer_idx": [9, 18], "attn_cfg": {"num_heads": 30}}
    with pytest.raises(CheckpointError, match=r"attn_layer_idx=\[9, 18\], which is not supported"):
        detect(attention).to_ours(attention, {})


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
