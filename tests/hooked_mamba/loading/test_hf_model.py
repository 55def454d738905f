"""Round trips between transformers' model objects and ours."""

import dataclasses

import pytest
import torch
import transformers

import hooked_mamba.models  # noqa: F401  # defines the models that configs shape
from hooked_mamba.loading import CheckpointError, from_hf_model, save_checkpoint, to_hf_model
from hooked_mamba.model.shapes import weight_shapes
from tests.hooked_mamba.loading.builders import HF_KINDS, PER_GROUP, assert_same, random_hf_model, stored_dtype

CASES = [(kind, seed) for kind in HF_KINDS for seed in range(8)]
UNSHAPING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def shaping(config):
    """The fields of a transformers config that say something about the function."""
    values = {name: value for name, value in config.to_dict().items() if name not in UNSHAPING}
    return values | {name: tuple(v) for name, v in values.items() if isinstance(v, list)}


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_round_trip_is_exact(kind, seed):
    theirs = random_hf_model(kind, seed)
    cfg, state = from_hf_model(theirs)
    assert {name: tuple(state[name].shape) for name in state} == weight_shapes(cfg)
    back = to_hf_model(cfg, state)
    assert type(back) is type(theirs)
    assert shaping(back.config) == shaping(theirs.config)
    assert_same(back.state_dict(), theirs.state_dict())
    tied = back.lm_head.weight is back.get_input_embeddings().weight
    assert tied == theirs.config.tie_word_embeddings == cfg.tie_embeddings
    again_cfg, again = from_hf_model(back)
    assert again_cfg == cfg
    assert_same(again, state)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_what_comes_back_computes_the_same_and_shares_nothing(kind):
    theirs = random_hf_model(kind, 3)
    back = to_hf_model(*from_hf_model(theirs))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.equal(back(tokens).logits, expected)
        for parameter in back.parameters():
            parameter.zero_()
        assert torch.equal(theirs(tokens).logits, expected)


def test_dtypes_stay_as_they_are():
    cfg, state = from_hf_model(random_hf_model("mamba", 0))
    mixed = {n: t if n.endswith("A_log") else t.bfloat16() for n, t in state.items()}
    back = to_hf_model(cfg, mixed)
    assert back.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert back.lm_head.weight.dtype == torch.bfloat16 == stored_dtype(back.config)


def test_fields_arrive_where_they_belong():
    config = transformers.Mamba2Config(
        hidden_size=24, num_hidden_layers=1, vocab_size=9, state_size=5, conv_kernel=3, expand=3, head_dim=6,
        num_heads=12, n_groups=3, time_step_limit=(0.1, 0.5), layer_norm_epsilon=1e-4, use_conv_bias=False,
        use_bias=True, chunk_size=32, residual_in_fp32=False, eos_token_id=[7, 8],
    )  # fmt: skip
    cfg, _ = from_hf_model(transformers.Mamba2ForCausalLM(config))
    assert (cfg.d_model, cfg.n_layers, cfg.d_vocab, cfg.d_state, cfg.d_conv) == (24, 1, 9, 5, 3)
    assert (cfg.E, cfg.H, cfg.P, cfg.G, cfg.norm_groups) == (72, 12, 6, 3, 3 if PER_GROUP else 1)
    assert (cfg.dt_limit, cfg.eps, cfg.norm_eps, cfg.chunk_size) == ((0.1, 0.5), 1e-4, 1e-4, 32)
    assert (cfg.conv_bias, cfg.use_bias, cfg.residual_in_fp32, cfg.tie_embeddings) == (False, True, False, False)
    assert cfg.eos_token_id == (7, 8)


def test_falcons_eps_is_not_the_blocks():
    config = transformers.FalconMambaConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=9, layer_norm_epsilon=1e-4, mixer_rms_eps=1e-3
    )
    cfg, _ = from_hf_model(transformers.FalconMambaForCausalLM(config))
    assert (cfg.eps, cfg.mixer_norm_eps, cfg.mixer_norms) == (1e-4, 1e-3, True)


def test_the_name_says_nothing_of_where_a_folder_lies(tmp_path):
    random_hf_model("mamba", 0).save_pretrained(tmp_path / "mine")
    loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path / "mine")
    assert from_hf_model(loaded)[0].model_name == "mine"
    loaded.config._name_or_path = "state-spaces/mamba-130m-hf"
    assert from_hf_model(loaded)[0].model_name == "state-spaces/mamba-130m-hf"


def test_the_object_decides_whether_embeddings_are_tied():
    model = random_hf_model("mamba", 0)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    cfg, state = from_hf_model(model)
    assert not cfg.tie_embeddings
    assert torch.equal(state["unembed.weight"], model.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_bare_backbone(tied):
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9, tie_word_embeddings=tied)
    cfg, state = from_hf_model(transformers.MambaModel(config))
    if tied:
        assert {name: tuple(state[name].shape) for name in state} == weight_shapes(cfg)
    else:
        assert set(weight_shapes(cfg)) - set(state) == {"unembed.weight"}


def test_a_gated_norm_over_the_full_width_is_noticed(tmp_path):
    """As in releases before 5: the object is taken at its word, and not written as something else."""
    config = transformers.Mamba2Config(
        hidden_size=16, num_hidden_layers=1, vocab_size=9, head_dim=8, num_heads=4, n_groups=2, state_size=4
    )
    model = transformers.Mamba2ForCausalLM(config)
    if PER_GROUP:
        del model.backbone.layers[0].mixer.norm.group_size
    cfg, state = from_hf_model(model)
    assert cfg.norm_groups == 1
    with pytest.raises(CheckpointError, match="norms per group: expected norm_groups=2, got 1"):
        save_checkpoint(tmp_path / "model", cfg, state)
    other = dataclasses.replace(cfg, norm_groups=1 if PER_GROUP else 2)  # what this release does not compute
    with pytest.raises(CheckpointError, match=r"in [12] groups for n_groups=2; expected norm_groups="):
        to_hf_model(other, state)


def test_unsupported_models_are_refused():
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9, hidden_act="gelu")
    with pytest.raises(CheckpointError, match=r"hidden_act='gelu'.*'silu'"):
        from_hf_model(transformers.MambaForCausalLM(config))
    with pytest.raises(CheckpointError, match="expected a transformers model"):
        from_hf_model(torch.nn.Linear(2, 2))
    llama = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=9, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(CheckpointError, match="model_type 'llama' is not supported; expected one of mamba, mamba2"):
        from_hf_model(transformers.LlamaForCausalLM(llama))


def test_the_other_family_is_refused_by_the_name_of_the_right_class():
    with pytest.raises(CheckpointError, match=r"'mamba2', not 'mamba'; load it with HookedMamba2\.from_pretrained"):
        from_hf_model(random_hf_model("mamba2", 0), family="mamba")


def test_what_transformers_cannot_express_is_refused():
    cfg, state = from_hf_model(random_hf_model("mamba", 1))
    other = dataclasses.replace(cfg, d_inner=cfg.E + 1)
    with pytest.raises(CheckpointError, match=r"shape: blocks\.0\.mixer\.in_proj\.weight"):
        to_hf_model(other, state, weight_shapes(other))
    cut = dict(state)
    del cut["ln_final.weight"]
    with pytest.raises(CheckpointError, match=r"missing: ln_final\.weight"):
        to_hf_model(cfg, cut, weight_shapes(cfg))
    cfg2, state2 = from_hf_model(random_hf_model("mamba2", 1))
    with pytest.raises(CheckpointError, match="one eps for all norms"):
        to_hf_model(dataclasses.replace(cfg2, norm_eps=0.5), state2)
