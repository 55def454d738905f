"""Against transformers: the same logits and tokens where it is right, and the places where it is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from hooked_mamba import HookedHybrid, load_model
from hooked_mamba.loading.tables import CheckpointError
from tests.hooked_mamba.hybrids import reference
from tests.hooked_mamba.hybrids.tiny import CASES, Tiny, config, published, tiny, tokens_for, twin, write
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
FP32 = 1e-5
SEEN_IN = "5.23."
"""The releases of transformers whose errors are stated here; another may have mended them."""

where_seen = pytest.mark.skipif(
    not transformers.__version__.startswith(SEEN_IN), reason="what another version of transformers does was not noted"
)


# Both ways -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_objects_and_files_both_ways(case, tmp_path):
    hf, tokens = tiny(case).hf, tokens_for()
    expected = hf(tokens).logits
    model = HookedHybrid.from_hf(hf)
    assert relative(model(tokens), expected) < FP32
    assert relative(model.to_hf()(tokens).logits, expected) < FP32
    write(hf, tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    assert torch.equal(loaded(tokens), model(tokens))
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours")(tokens), model(tokens))
    again = published(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    assert relative(again(tokens).logits, expected) < FP32


@torch.no_grad()
@pytest.mark.parametrize("case", ["bamba", "granite-dense", "jamba", "lfm2"])
def test_heads_whose_widths_do_not_add_up_to_that_of_the_stream(case, tmp_path):
    """The classes read a key head_dim that their configs do not list."""
    hf, tokens = twin(case, head_dim=12), tokens_for()
    assert hf.config.hidden_size != 12 * hf.config.num_attention_heads
    model = HookedHybrid.from_hf(hf)
    assert relative(model(tokens), hf(tokens).logits) < FP32
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    again = published(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert relative(again(tokens).logits, hf(tokens).logits) < FP32


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    hf, tokens = tiny(case).hf, tokens_for(length=9)
    expected = hf.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    model = HookedHybrid.from_hf(hf)
    got = model.generate(tokens, 8, do_sample=False, verbose=False, stop_at_eos=False)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_a_config_can_be_one_of_ours_alone(tmp_path):
    """Back from its own dictionary, and saved under its family's names."""
    model = HookedHybrid.from_hf(tiny("granite-moe").hf)
    assert type(model.cfg).from_dict(json.loads(json.dumps(model.cfg.to_dict()))) == model.cfg


WORDS = {
    "bamba": {"attn_layer_indices": [2]},
    "granite-dense": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "granite-dense, new": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    },
    "granite-dense, old": {"layer_types": None, "layers_block_type": ["mamba", "attention", "mamba", "mamba"]},
    "nemotron": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"]},
    "nemotron, new": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]},
    "nemotron, letters": {"layers_block_type": None, "hybrid_override_pattern": "ME*-M"},
    "nemotron, small letters": {"layers_block_type": None, "hybrid_override_pattern": "me*-m"},
}


@torch.no_grad()
@pytest.mark.parametrize("name", WORDS)
def test_every_spelling_of_layers(name, tmp_path):
    case = name.partition(",")[0]
    hf = tiny(case).hf
    write(hf, tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for spelling in ("layer_types", "layers_block_type", "hybrid_override_pattern", "attn_layer_indices"):
        fields.pop(spelling, None)
    file.write_text(json.dumps(fields | {k: v for k, v in WORDS[name].items() if v is not None}))
    assert relative(load_model(tmp_path)(tokens_for()), hf(tokens_for()).logits) < FP32


def test_an_unknown_word_and_a_wrong_count_are_named():
    from hooked_mamba.loading.registry import detect

    fields = config("nemotron").to_dict()
    fields.pop("layer_types", None)
    for words, said in ((["mamba", "recurrent"], "recurrent"), (["mamba"] * 3, "num_hidden_layers")):
        with pytest.raises(CheckpointError, match=said):
            detect(fields).to_ours(fields | {"layers_block_type": words, "num_hidden_layers": 2}, {})


def test_wrong_tensors_are_named_as_the_file_names_them_all_at_once(tmp_path):
    from safetensors.torch import load_file, save_file

    write(tiny("jamba").hf, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mamba.extra.weight"] = torch.zeros(3)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert "model.layers.0.mamba.extra.weight" in str(caught.value)
    assert "model.layers.1.self_attn.q_proj.weight" in str(caught.value)


# Where transformers is wrong -----------------------------------------------------------------------------------------


def cached(hf, tokens: Tensor, before: Tensor, mask: Tensor | None = None, **kwargs) -> Tensor:
    """Logits of `tokens` behind `before`, by transformers' cache."""
    first = hf(before, attention_mask=mask, use_cache=True)
    return hf(tokens, past_key_values=first.past_key_values, use_cache=True, **kwargs).logits


def continued(model, tokens: Tensor, before: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same here."""
    _, state = model(before, attention_mask=mask, return_state=True)
    return model(tokens, initial_state=state)


def truth(one: Tiny, tokens: Tensor, last: int) -> np.ndarray:
    return reference.forward(one.config, one.weights, tokens.numpy()).logits[:, -last:]


def state_they_fail(theirs: Tensor, ours: Tensor, expected: np.ndarray, least: float = 0.05) -> None:
    """We are right and transformers is off by more than `least` of the largest logit."""
    error = float(np.abs(theirs.double().numpy() - expected).max())
    print(f"transformers is off by {error:.2g}, of logits up to {np.abs(expected).max():.2g}")
    assert relative(ours, expected) < FP32
    assert error > least * np.abs(expected).max(), "transformers is right here: say so"


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in CASES if c in ("jamba", "zamba")])
def test_a_second_chunk_forgets_the_state_of_mamba_1(case):
    one, tokens = tiny(case), tokens_for(length=14)
    model = HookedHybrid.from_hf(one.hf)
    theirs = cached(one.hf, tokens[:, 6:], tokens[:, :6])
    state_they_fail(theirs, continued(model, tokens[:, 6:], tokens[:, :6]), truth(one, tokens, 8))


@where_seen
@torch.no_grad()
def test_bambas_positions_restart_in_a_cached_call():
    one, tokens = tiny("bamba"), tokens_for(length=14)
    model = HookedHybrid.from_hf(one.hf)
    theirs = cached(one.hf, tokens[:, 6:], tokens[:, :6])
    state_they_fail(theirs, continued(model, tokens[:, 6:], tokens[:, :6]), truth(one, tokens, 8))


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_step_behind_right_padding(case):
    one, tokens = tiny(case), tokens_for(rows=1, length=9)
    model = HookedHybrid.from_hf(one.hf)
    padded = torch.cat([tokens[:, :6], torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    more = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
    theirs = cached(one.hf, tokens[:, 6:7], padded, mask, attention_mask=more)
    ours = continued(model, tokens[:, 6:7], padded, mask)
    state_they_fail(theirs, ours, truth(one, tokens[:, :7], 1), least=0.001)


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("case", ["bamba", "granite-dense", "falcon"])
def test_a_step_skips_the_clamp_of_dt(case):
    one = Tiny(case, time_step_limit=(0.05, 0.2))
    tokens = tokens_for(length=10)
    model = HookedHybrid.from_hf(one.hf)
    assert model.cfg.branches["mixer"].dt_limit == (0.05, 0.2)
    theirs = cached(one.hf, tokens[:, 9:], tokens[:, :9], position_ids=torch.full((2, 1), 9))
    state_they_fail(theirs, continued(model, tokens[:, 9:], tokens[:, :9]), truth(one, tokens, 1), least=0.001)


@torch.no_grad()
def test_nemotron_objects_clamp_where_the_published_code_does_not(tmp_path):
    """A file's step sizes are clamped by its time_step_limit; an object is read as it computes."""
    one = Tiny("nemotron")
    for name, p in one.hf.named_parameters():
        if name.endswith("dt_bias"):
            p.sub_(9)
    tokens = tokens_for()
    write(one.hf, tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    from_file, from_object = load_model(tmp_path), HookedHybrid.from_hf(hf)
    theirs = hf(tokens).logits
    assert relative(from_object(tokens), theirs) < FP32
    assert from_file.cfg.branches["mixer"].dt_limit == (0.0, float("inf"))
    assert relative(from_file.to_hf()(tokens).logits, from_file(tokens)) < FP32
    if transformers.__version__.startswith(SEEN_IN):
        assert from_object.cfg.branches["mixer"].dt_limit[0] == 0.001
        assert relative(from_file(tokens), theirs) > 1e-3


@where_seen
@torch.no_grad()
def test_falcons_embeddings_skip_their_factor_as_inputs():
    one, tokens = tiny("falcon"), tokens_for(length=8)
    model = HookedHybrid.from_hf(one.hf)
    theirs = one.hf(inputs_embeds=one.hf.get_input_embeddings()(tokens)).logits
    _, cache = model.run_with_cache(tokens, names_filter="hook_embed")
    state_they_fail(theirs, model(cache["hook_embed"], start_at_layer=0), truth(one, tokens, 8))


@where_seen
@torch.no_grad()
def test_router_logits_of_granite_without_experts():
    one = tiny("granite-dense")
    with pytest.raises((TypeError, IndexError, AttributeError, ValueError)):
        one.hf(tokens_for(length=4), output_router_logits=True)
    _, cache = HookedHybrid.from_hf(one.hf).run_with_cache(tokens_for(length=4))
    assert not [name for name in cache if "router" in name]


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_float64_is_float32_inside(case):
    one, tokens = Tiny(case), tokens_for()
    theirs = one.hf.double()(tokens).logits
    expected = truth(one, tokens, 17)
    error = relative(theirs, expected)
    print(f"transformers in float64 is off by {error:.1g} of the largest logit")
    assert relative(one.model(tokens), expected) < 1e-12
    assert error > 1e-9


@where_seen
@torch.no_grad()
@pytest.mark.parametrize("case", ["jamba", "bamba", "falcon"])
def test_convolutions_and_patterns_are_silent(case):
    hf, fired = twin(case), []
    for name, module in hf.named_modules():
        if name.endswith("conv1d"):
            module.register_forward_hook(lambda *a: fired.append(1))
    out = hf(tokens_for(), output_attentions=True)
    assert fired == []
    assert not [a for a in out.attentions or () if a is not None]
    _, cache = HookedHybrid.from_hf(hf).run_with_cache(tokens_for())
    assert [n for n in cache if n.endswith("hook_conv")]
    assert [n for n in cache if n.endswith("hook_pattern")]
