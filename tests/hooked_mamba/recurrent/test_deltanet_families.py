"""Families of gated DeltaNet: Qwen3-Next and Qwen3.5 against transformers, fla's files, both ways."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hooked_mamba import HookedDeltaNet, HookedHybrid, load_model
from hooked_mamba.analysis import fold_norms
from hooked_mamba.frozen.run import Run
from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.registry import detect
from tests.hooked_mamba.recurrent.models import bare, build, equations, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-12
THEIRS = 1e-5
"""transformers casts to float32 within the delta rule, also in a float64 model."""

COMMON = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "intermediate_size": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 7,
}
POSITIONS = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}

CASES = {
    "qwen3_next": ("Qwen3Next", EXPERTS | {"mlp_only_layers": [1], "rope_parameters": POSITIONS}),
    "qwen3_next, dense": ("Qwen3Next", {"num_experts": 0, "rope_parameters": POSITIONS, "attention_bias": True}),
    "qwen3_5": ("Qwen3_5", {"tie_word_embeddings": True, "rope_parameters": POSITIONS | {"mrope_section": [1, 1, 0]}}),
    "olmo_hybrid": ("OlmoHybrid", {"rope_parameters": None}),
    "olmo_hybrid, turned": ("OlmoHybrid", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "qwen3_5_moe": ("Qwen3_5Moe", EXPERTS | {"rope_parameters": POSITIONS | {"mrope_section": [1, 1, 0]}}),
}


def in_float64(hf):
    """Its grouped products over experts take no float64."""
    hf.config._experts_implementation = "eager"
    return hf.double().eval()


@torch.no_grad()
def theirs(case: str, **changes):
    """A tiny float64 model of transformers, every weight drawn away from 0 and 1."""
    name, fields = CASES[case]
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = getattr(transformers, f"{name}Config", None)
    if name.startswith("Qwen3_5"):
        config_class = getattr(transformers, f"{name}TextConfig")
    torch.manual_seed(0)
    hf = getattr(transformers, f"{name}ForCausalLM")(config_class(**(COMMON | fields | changes)))
    for p in hf.parameters():
        p.add_(torch.randn(p.shape) * 0.2)
    return in_float64(hf)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_objects_and_files_both_ways(case, tmp_path):
    hf, tokens = theirs(case), tokens_for(length=9)
    expected = hf(tokens).logits
    model = HookedHybrid.from_hf(hf)
    assert relative(model(tokens), expected) < THEIRS
    assert relative(in_float64(model.to_hf())(tokens).logits, expected) < THEIRS
    hf.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", dtype="float64")
    assert relative(loaded(tokens), model(tokens)) < EXACT
    loaded.save_pretrained(tmp_path / "ours")
    assert relative(load_model(tmp_path / "ours", dtype="float64")(tokens), model(tokens)) < EXACT
    again = in_float64(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    assert relative(again(tokens).logits, expected) < THEIRS


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_one_pass(case):
    model, tokens = HookedHybrid.from_hf(theirs(case)).double(), tokens_for(length=9)
    first, state = model(tokens[:, :4], return_state=True)
    second = model(tokens[:, 4:], initial_state=state)
    assert relative(torch.cat([first, second], 1), model(tokens)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("case", ["qwen3_next", "qwen3_5", "olmo_hybrid"])
def test_branches_are_their_chains(case):
    """The gate of attention and that of the shared expert are gains, the pattern and the delta rule are held."""
    model, tokens = HookedHybrid.from_hf(theirs(case)).double(), tokens_for(length=6)
    run = Run(model, tokens)
    for layer in range(4):
        for stage in run.stages(layer):
            for part in stage:
                if str(part).endswith("moe"):
                    continue
                got = run.chain(part).apply(run.entering(part))["out"]
                assert relative(got, run.out(layer, run.branch_of(part)[1])) < 1e-10, part


@torch.no_grad()
def test_files_with_other_parts_beside_the_language_model(tmp_path):
    """As Qwen3.5 is published: text_config, weights under model.language_model, vision and mtp beside them."""
    hf, tokens = theirs("qwen3_5"), tokens_for()
    hf.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    moved = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    moved |= {"model.visual.patch.weight": torch.zeros(2), "mtp.fc.weight": torch.zeros(2)}
    (tmp_path / "whole").mkdir()
    torch.save(moved, tmp_path / "whole" / "pytorch_model.bin")
    whole = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": config, "vision_config": {}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    assert torch.equal(load_model(tmp_path / "whole")(tokens), load_model(tmp_path / "plain")(tokens))


# fla's gated_deltanet ------------------------------------------------------------------------------------------

FLA_NAMES = {
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.a_proj.weight",
    "attn.b_proj.weight",
    "attn.g_proj.weight",
    "attn.A_log",
    "attn.dt_bias",
    "attn.q_conv1d.weight",
    "attn.k_conv1d.weight",
    "attn.v_conv1d.weight",
    "attn.o_norm.weight",
    "attn.o_proj.weight",
    "attn_norm.weight",
    "mlp_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
}
"""A block's tensors in fla 0.6.0."""


def fla_model(kind: str):
    import dataclasses

    model = build(kind)
    fields = {"architecture": "gated_deltanet", "eps": model.cfg.branches["mixer"].norm_eps}
    fla = HookedDeltaNet(dataclasses.replace(model.cfg, **fields)).double()
    fla.load_state_dict(model.state_dict())
    return fla.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["deltanet", "deltanet-bare", "deltanet-sigmoid"])
def test_files_of_fla_both_ways(kind, tmp_path):
    model, tokens = fla_model(kind), tokens_for()
    assert relative(model(tokens), equations(model, tokens).logits) < 1e-12
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path, dtype="float64"), HookedDeltaNet.from_pretrained(tmp_path, dtype="float64")):
        assert relative(loaded(tokens), model(tokens)) < EXACT
    tensors = load_file(tmp_path / "model.safetensors")
    if kind == "deltanet":
        block = {name.removeprefix("model.layers.1.") for name in tensors if name.startswith("model.layers.1.")}
        assert block == FLA_NAMES
        w = model.state_dict()["blocks.1.mixer.in_proj.weight"]
        assert torch.equal(tensors["model.layers.1.attn.k_proj.weight"], w[10:20])
        assert tensors["model.layers.1.attn.v_conv1d.weight"].shape == (12, 1, 4)


def test_errors(tmp_path):
    model = fla_model("deltanet")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, match in (
        ({"attn": {"layers": [1]}}, "attn="),
        ({"output_gate_activation": "tanh"}, "output_gate_activation='tanh'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=match):
            load_model(tmp_path)
    with pytest.raises(TypeError, match="architecture 'gated_deltanet', got 'hybrid'"):
        HookedDeltaNet(build("deltanet").cfg)


@pytest.mark.parametrize("kind", ["deltanet", "deltanet-bare", "deltanet-sigmoid"])
def test_norms_are_folded_into_all_that_read_them(kind):
    model, tokens = bare(kind), tokens_for()
    folded = fold_norms(model)
    assert relative(folded(tokens), model(tokens)) < EXACT
    assert bool((folded.blocks[0].norm.weight == 1).all())


def test_kimi_is_refused_with_the_reason():
    with pytest.raises(CheckpointError, match=r"'kimi_linear' is not supported: .*MLA"):
        detect({"model_type": "kimi_linear", "hidden_size": 8})


def test_norms_that_cannot_be_folded():
    with pytest.raises(ValueError, match="LayerNorms"):
        fold_norms(build("rwkv7"))
    with pytest.raises(ValueError, match="come after their branches"):
        fold_norms(HookedHybrid.from_hf(theirs("olmo_hybrid")))
