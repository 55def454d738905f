"""Round trips between mamba_ssm's checkpoints and ours."""

import json
import math

import pytest
import torch

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading import CheckpointError, load_checkpoint, raw_mamba, raw_mamba2, save_checkpoint
from hooked_mamba.model.shapes import weight_shapes
from tests.hooked_mamba.loading.builders import assert_same, random_raw

PAIRS = {"raw_mamba": raw_mamba, "raw_mamba2": raw_mamba2}
CASES = [(kind, seed) for kind in PAIRS for seed in range(10)]
SMALL = {"d_model": 16, "n_layer": 1, "vocab_size": 21}


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_round_trip_is_exact(kind, seed):
    config, state = random_raw(kind, seed)
    cfg, ours = PAIRS[kind].to_ours(config, state)
    assert {name: tuple(ours[name].shape) for name in ours} == weight_shapes(cfg)
    back_config, back = PAIRS[kind].from_ours(cfg, ours)
    assert back_config == config
    assert_same(back, state)


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind in PAIRS for seed in range(3)])
def test_round_trip_through_files(kind, seed, tmp_path):
    config, state = random_raw(kind, seed)
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")
    found = load_checkpoint(folder)
    assert found.format == kind
    save_checkpoint(tmp_path / "again", found.cfg, found.state_dict, format="raw")
    # what mamba_ssm's own loader does: this one file, no safetensors, a strict load of every name
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert_same(again, state)
    if config["tie_embeddings"]:
        assert again["lm_head.weight"].data_ptr() == again["backbone.embedding.weight"].data_ptr()
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written == json.loads(json.dumps(config))
    assert load_checkpoint(tmp_path / "again").cfg == found.cfg.__class__.from_dict(
        found.cfg.to_dict() | {"model_name": "again"}
    )


def test_absent_fields_have_mamba_ssms_defaults():
    cfg, _ = raw_mamba.to_ours({"d_model": 40, "n_layer": 1, "vocab_size": 50277}, {})
    assert cfg == MambaConfig(
        d_model=40, n_layers=1, d_vocab=50280, d_vocab_unpadded=50277, d_state=16, d_conv=4, expand=2, dt_rank=3,
        tie_embeddings=True, residual_in_fp32=True, eps=1e-5,
    )  # fmt: skip
    config = {"d_model": 64, "n_layer": 1, "vocab_size": 50277, "pad_vocab_size_multiple": 16}
    cfg2, _ = raw_mamba2.to_ours(config | {"ssm_cfg": {"layer": "Mamba2"}}, {})
    assert cfg2 == Mamba2Config(
        d_model=64, n_layers=1, d_vocab=50288, d_vocab_unpadded=50277, d_state=128, head_dim=64, n_groups=1,
        chunk_size=256, tie_embeddings=True, dt_limit=(0.0, math.inf),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm": False}, "rms_norm=False"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"attn_cfg": {"num_heads": 2}}, "attn_cfg"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"vocab_size": 0}, "positive integer"),
        ({"pad_vocab_size_multiple": 0}, "positive integer"),
        ({"tie_embedings": False}, "did you mean 'tie_embeddings'"),
        ({"ssm_cfg": {"d_stat": 8}}, "did you mean 'd_state'"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer='Mamba2'"),
    ],
)
def test_unsupported_fields_are_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        raw_mamba.to_ours(SMALL | fields, {})


@pytest.mark.parametrize(
    ("ssm_cfg", "message"),
    [
        ({"rmsnorm": False}, "rmsnorm=False"),
        ({"norm_before_gate": True}, "norm_before_gate=True"),
        ({"d_ssm": 8}, "d_ssm=8.*None or 32"),
        ({"layer": "Mamba1"}, "layer='Mamba1'"),
        ({"use_fast_path": True}, "use_fast_path"),
    ],
)
def test_unsupported_mamba2_fields_are_refused(ssm_cfg, message):
    with pytest.raises(CheckpointError, match=message):
        raw_mamba2.to_ours(SMALL | {"ssm_cfg": {"layer": "Mamba2", "headdim": 8} | ssm_cfg}, {})


def test_missing_fields_are_named():
    with pytest.raises(CheckpointError, match="lacks n_layer, vocab_size"):
        raw_mamba.to_ours({"d_model": 16}, {})


def test_a_tied_config_with_two_tensors_is_refused():
    config, state = random_raw("raw_mamba", 0, tie_embeddings=True)
    state["lm_head.weight"] = state["backbone.embedding.weight"].clone()
    cfg, ours = raw_mamba.to_ours(config, state)  # two equal copies are one
    assert cfg.tie_embeddings
    assert "unembed.weight" not in ours
    state["lm_head.weight"][-1, -1] += 1e-3
    with pytest.raises(CheckpointError, match="two different tensors"):
        raw_mamba.to_ours(config, state)


def test_a_tied_checkpoint_without_the_second_name():
    config, state = random_raw("raw_mamba2", 0, tie_embeddings=True)
    del state["lm_head.weight"]
    cfg, ours = raw_mamba2.to_ours(config, state)
    assert set(ours) == set(weight_shapes(cfg))


def test_two_names_for_the_embedding_are_refused():
    config, state = random_raw("raw_mamba", 0)
    state["backbone.embeddings.weight"] = state["backbone.embedding.weight"]
    with pytest.raises(CheckpointError, match=r"both .*embedding.* hold 'embed\.weight'"):
        raw_mamba.to_ours(config, state)


def test_names_of_no_table_stay_to_be_reported():
    config, state = random_raw("raw_mamba", 0)
    beyond = f"backbone.layers.{config['n_layer']}.norm.weight"
    _, ours = raw_mamba.to_ours(config, state | {beyond: torch.zeros(1), "rotary": torch.zeros(1)})
    assert {beyond, "rotary"} <= set(ours)


def test_D_per_channel_is_taken_where_it_is_one_number_per_head():
    config, state = random_raw("raw_mamba2", 1)
    config["ssm_cfg"]["D_has_hdim"] = True
    P = config["ssm_cfg"]["headdim"]
    name = "backbone.layers.0.mixer.D"
    per_head = state[name]
    _, ours = raw_mamba2.to_ours(config, state | {name: per_head.repeat_interleave(P)})
    assert torch.equal(ours["blocks.0.mixer.D"], per_head)
    wide = per_head.repeat_interleave(P)
    wide[P] += 1e-6
    wide[-1] += 1.0
    _, ours = raw_mamba2.to_ours(config, state | {name: wide})
    with pytest.raises(CheckpointError, match=r"D of block 0 .* differ in 2 of .* first in head 1"):
        ours["blocks.0.mixer.D"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 1e-6}, "eps=1e-05 built in"),
        ({"mixer_norms": True}, "mixer_norms=False"),
        ({"d_inner": 40}, "inner width"),
    ],
)
def test_what_mamba_ssm_cannot_express_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        raw_mamba.from_ours(MambaConfig(d_model=16, n_layers=1, d_vocab=8, **fields), {})


@pytest.mark.parametrize(
    ("fields", "message"), [({"norm_groups": 1}, "norm_groups=2"), ({"norm_eps": 1e-6}, "norm_eps=1e-05 built in")]
)
def test_what_mamba_ssm_cannot_express_in_mamba2_is_refused(fields, message):
    cfg = Mamba2Config(d_model=16, n_layers=1, d_vocab=8, head_dim=8, n_groups=2, **fields)
    with pytest.raises(CheckpointError, match=message):
        raw_mamba2.from_ours(cfg, {})


@pytest.mark.parametrize("vocab", [50280, 50288, 17])
def test_a_vocabulary_that_was_never_padded_keeps_its_rows(vocab):
    cfg = MambaConfig(d_model=16, n_layers=1, d_vocab=vocab)
    config, _ = raw_mamba.from_ours(cfg, {})
    assert raw_mamba.to_ours(config, {})[0].d_vocab == vocab
