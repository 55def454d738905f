"""Wrong input: each a clear error that names what it got, what it expected, and what is near."""

from __future__ import annotations

import re

import pytest
import torch

from hooked_mamba import (
    ActivationCache,
    HookedMamba,
    HookedMamba2,
    LayerState,
    Mamba2Config,
    MambaConfig,
    ModelState,
    memory,
)
from hooked_mamba.hooks.names import HookNameError
from hooked_mamba.loading import CheckpointError
from tests.hooked_mamba.tiny import build, tokens_for
from tests.kinds import MAMBA, MIXERS

pytestmark = pytest.mark.usefixtures("unchecked")
DT = "blocks.0.mixer.hook_dt"


@pytest.fixture(params=MAMBA)
def model(request):
    return build(request.param)


def same(v, hook):
    return v


# Names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blocks.0.mixer.hook_dtt", "blocks.0.mixer.hook_dt"),
        ("blocks.0.hook_dt", "blocks.0.mixer.hook_dt"),
        ("blocks.7.mixer.hook_dt", "blocks.0.mixer.hook_dt"),
        ("block.1.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("hook_logit", "hook_logits"),
        ("blocks.1.mixer.hook_hh.3", "blocks.1.mixer.hook_h"),
        ("blocks.*.mixer.hook_delt", "hook_d"),
        ("hook_Embed", "hook_embed"),
    ],
)
def test_a_wrong_name(model, tokens, wrong, near):
    count = len(model.hook_dict)
    calls = (
        lambda: model.run_with_cache(tokens, names_filter=wrong),
        lambda: model.run_with_cache(tokens, names_filter=["hook_embed", wrong]),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(wrong, same)]),
        lambda: model.add_hook(wrong, same),
        lambda: model.hook_point(wrong),
    )
    for call in calls:
        with pytest.raises(KeyError) as error:
            call()
        message = str(error.value)
        assert f"no hook site is named {wrong!r}" in message
        assert near in message
        assert f"{count} sites in {model.cfg.n_layers} blocks" in message
        assert not message.startswith(('"', "'")), "a KeyError's message comes in quotes unless one sees to it"
    assert not any(point.wanted for point in model.hook_points())


def test_a_site_of_the_other_family():
    with pytest.raises(KeyError, match=r"'blocks.0.mixer.hook_x_proj'; nearest: .*blocks.0.mixer"):
        build("mamba2").run_with_cache(torch.tensor([[1]]), names_filter="blocks.0.mixer.hook_x_proj")
    with pytest.raises(KeyError, match=r"'blocks.0.mixer.norm.hook_scale'; nearest: blocks.0.norm.hook_scale"):
        build("mamba").run_with_cache(torch.tensor([[1]]), names_filter="blocks.0.mixer.norm.hook_scale")


def test_a_wrong_key_of_the_cache(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=[DT, "hook_embed"])
    with pytest.raises(KeyError, match=r"blocks.0.mixer.hook_h was not cached. Ask for it by names_filter='blocks.0"):
        cache["h", 0]
    with pytest.raises(KeyError, match=r"hook_dt_grad was not cached.*incl_bwd=True.*holds 2 sites"):
        cache["dt_grad", 0]
    with pytest.raises(KeyError, match=r"'blocks.0.mixer.hook_ddt'; nearest: blocks.0.mixer.hook_dt"):
        cache["ddt", 0]
    with pytest.raises(KeyError, match=r"no hook site is named 'hook_dt'"):
        cache["dt"]


def test_a_filter_that_is_no_filter(model, tokens):
    with pytest.raises(TypeError, match="a names_filter holds names, got int: 3"):
        model.run_with_cache(tokens, names_filter=["hook_embed", 3])


def test_a_cache_tells_what_was_not_cached_from_what_does_not_exist(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=DT)
    assert isinstance(cache, ActivationCache)
    with pytest.raises(KeyError, match=r"blocks.0.mixer.hook_h.4 was not cached"):
        cache["h.4", 0]
    with pytest.raises(
        HookNameError, match=rf"'blocks.1.mixer.hook_dtt'.* has {len(model.hook_dict)} sites in 2 blocks"
    ):
        cache["dtt", 1]


def test_a_hook_point_is_no_predicate(model, tokens):
    point = model.hook_point(DT)
    calls = (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(point, lambda v, hook: v * 0)]),
        lambda: model.run_with_cache(tokens, names_filter=point),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"holds names, got the hook point {DT}"):
            call()


# Hooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["hook_dt", "hook_h", "hook_h.1", "hook_A_bar", "hook_z"])
def test_a_hook_that_returns_something_else(model, tokens, site):
    name = f"blocks.0.mixer.{site}"
    _, cache = model.run_with_cache(tokens, names_filter=name)
    for fn, kind, got in (
        (lambda v, hook: v[:, :1], ValueError, r"\[2, 1"),
        (lambda v, hook: v.double(), ValueError, "float64"),
        (lambda v, hook: v.to("meta"), ValueError, "on meta"),
        (lambda v, hook: v.tolist(), TypeError, "list; expected a tensor or None"),
        (lambda v, hook: 0, TypeError, "int; expected a tensor or None"),
        (lambda v, hook: (v,), TypeError, "tuple; expected a tensor or None"),
    ):
        with pytest.raises(kind, match=f"a forward hook at {re.escape(name)} returned .*{got}") as error:
            model.run_with_hooks(tokens, fwd_hooks=[(name, fn)])
        if kind is ValueError:
            assert f"expected float32 {list(cache[name].shape)} on cpu" in str(error.value)
        assert not any(point.wanted for point in model.hook_points())


def test_a_backward_hook_that_returns_something_else(model, tokens):
    for fn, kind, message in (
        (
            lambda g, hook: g[:, :1],
            ValueError,
            r"a backward hook at .*hook_dt returned float32 \[2, 1.*expected float32",
        ),
        (lambda g, hook: 3, TypeError, r"a backward hook at .*hook_dt returned int; expected a tensor or None"),
    ):
        loss = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(DT, fn)])
        with pytest.raises(kind, match=message):
            loss.backward()


def test_what_is_no_function(model):
    with pytest.raises(TypeError, match=r"a hook at .*hook_dt must be a function fn\(tensor, hook\), got int"):
        model.add_hook(DT, 3)
    for call in (lambda: model.add_hook(DT, same, dir="forward"), lambda: model.hook_dict[DT].remove_hooks("back")):
        with pytest.raises(ValueError, match=r"dir must be 'fwd'.*got '(forward|back)'"):
            call()


def test_backward_hooks_where_there_is_no_gradient(model, tokens):
    with pytest.raises(RuntimeError, match="hook_tokens holds integers, which have no gradient"):
        model.run_with_hooks(tokens, bwd_hooks=[("hook_tokens", same)])
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"a backward hook on .*hook_dt cannot fire: gradients are sw"),
    ):
        model.run_with_hooks(tokens, bwd_hooks=[(DT, same)])
    with pytest.raises(RuntimeError, match="cannot fire"), model.hooks(bwd_hooks=[(DT, same)]):
        model.generate(tokens, max_new_tokens=2, verbose=False)
    with pytest.raises(ValueError, match=r"incl_bwd needs a model output of one number.*got a tensor of shape \[2, 6"):
        model.run_with_cache(tokens, incl_bwd=True)
    with pytest.raises(ValueError, match=r"incl_bwd needs .* got NoneType"):
        model.run_with_cache(tokens, incl_bwd=True, return_type=None)


@pytest.mark.parametrize("t", [6, -7, 100])
def test_a_state_out_of_range(model, tokens, t):
    name = f"blocks.1.mixer.hook_h.{t}"
    message = rf"{re.escape(name)}: position {t} is out of range, this call has 6 positions \(-6 to 5\)"
    with pytest.raises(IndexError, match=message):
        model.run_with_hooks(tokens, fwd_hooks=[(name, same)])
    with pytest.raises(IndexError, match=message):
        model.run_with_cache(tokens, names_filter=name)


# Caches ------------------------------------------------------------------------------------------------------


def test_positions_out_of_range(model, tokens):
    for pos in (6, -7, [0, 6]):
        with pytest.raises(IndexError, match=r"pos_slice: position (6|-7) is out of range for 6 positions"):
            model.run_with_cache(tokens, pos_slice=pos)
    with pytest.raises(TypeError, match="pos_slice must be an int, slice, list of ints or None, got str"):
        model.run_with_cache(tokens, pos_slice="last")


def test_no_batch_dim_of_a_batch(model, tokens):
    with pytest.raises(ValueError, match="cannot drop the batch axis of 2 rows"):
        model.run_with_cache(tokens, remove_batch_dim=True)


def test_a_cache_larger_than_memory(model, tokens, monkeypatch):
    computed = []
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1024)
    model.add_hook("hook_embed", lambda v, hook: computed.append(1))
    filters = [None, "blocks.*.mixer.hook_h", lambda name: True]
    for names_filter in filters:
        resid = torch.zeros(*tokens.shape, model.cfg.d_model)
        inputs: tuple = (((tokens,), {}), ((), {"input": tokens}), ((resid,), {"start_at_layer": 1}))
        for arguments, keywords in inputs:
            with pytest.raises(
                MemoryError, match=r"this cache would take .* GiB \(.* sites, the largest .*hook_.* free"
            ):
                model.run_with_cache(*arguments, names_filter=names_filter, **keywords)
    assert computed == [], "asked before anything is computed"
    model.run_with_cache(tokens[:1, :2], names_filter="blocks.0.mixer.hook_dt", pos_slice=-1)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    model.run_with_cache(tokens)


@pytest.mark.parametrize("model", MIXERS, indirect=True)
def test_the_estimate_of_a_cache_is_exact(model, tokens, monkeypatch):
    """Free memory of exactly the cache's size is enough, one byte less is not."""
    names = list(model.hook_dict)
    for keywords in ({}, {"pos_slice": [1, 2]}, {"pos_slice": -1}):
        _, cache = model.run_with_cache(tokens, names_filter=names, **keywords)
        size = sum(value.nbytes for value in cache.values())
        monkeypatch.setattr(memory, "available_bytes", lambda device, size=size: size)
        model.run_with_cache(tokens, names_filter=names, **keywords)
        monkeypatch.setattr(memory, "available_bytes", lambda device, size=size: size - 1)
        with pytest.raises(MemoryError):
            model.run_with_cache(tokens, names_filter=names, **keywords)
        monkeypatch.undo()


# Input -------------------------------------------------------------------------------------------------------


def test_tokens(model, tokens):
    V = model.cfg.d_vocab
    for bad, got in ((tokens + V, r"\d+"), (tokens - V, r"-\d+")):
        with pytest.raises(IndexError, match=f"token id {got} is out of range: the vocabulary has {V} rows"):
            model(bad)
    for empty in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"the input is empty: tokens of shape \[(1, 0|0, 3)\]"):
            model(empty)
    with pytest.raises(ValueError, match=r"expected text or token ids of shape \[batch, position\], got torch.float32"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"expected text or token ids .* \[1, 2, 6\]"):
        model(tokens[None])
    with pytest.raises(ValueError, match=r"the input is empty: \[\]"):
        model([])
    with pytest.raises(ValueError, match="needs a tokenizer and this model has none"):
        model("hello")


def test_residual_input(model, tokens):
    resid = torch.randn(2, 6, model.cfg.d_model)
    for bad in (resid[..., :-1], resid[0], tokens):
        with pytest.raises(
            ValueError, match=rf"start_at_layer takes a residual stream \[batch, position, {model.cfg.d_model}\]"
        ):
            model(bad, start_at_layer=0)
    with pytest.raises(ValueError, match="the loss of a residual input needs its tokens"):
        model(resid, start_at_layer=0, return_type="loss")
    with pytest.raises(ValueError, match="the loss needs two tokens or more"):
        model(tokens[:, :1], return_type="loss")


@pytest.mark.parametrize("name", ["start_at_layer", "stop_at_layer"])
def test_layers(model, tokens, name):
    for layer in (3, -3):
        with pytest.raises(IndexError, match=f"{name}={layer} is out of range for a model of 2 layers"):
            model(tokens, **{name: layer})


def test_masks(model, tokens):
    mask = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 5\], expected \[2, 6\] like the tokens"):
        model(tokens, attention_mask=mask[:, :5])
    hole = mask.clone()
    hole[1, 3] = 0
    with pytest.raises(
        ValueError, match=r"attention_mask has a hole: row 1 is masked between real tokens \(column 3\)"
    ):
        model(tokens, attention_mask=hole)
    with pytest.raises(ValueError, match=r"may hold only 0 .* and 1"):
        model(tokens, attention_mask=mask * 2)
    with pytest.raises(ValueError, match=r"may hold only 0 .* and 1"):
        model(tokens, attention_mask=mask * 0.5)


def test_states(model, tokens):
    _, state = model(tokens, return_state=True)
    with pytest.raises(ValueError, match=r"initial_state\[0\].conv is \[2, .*expected \[1,"):
        model(tokens[:1], initial_state=state)
    with pytest.raises(ValueError, match="initial_state has 1 layers, the model has 2"):
        model(tokens, initial_state=ModelState(state.layers[:1]))
    short = ModelState(tuple(LayerState(layer.conv, layer.ssm[..., :-1]) for layer in state))
    with pytest.raises(ValueError, match=r"initial_state\[0\].ssm is .* expected"):
        model(tokens, initial_state=short)
    with pytest.raises(TypeError, match="initial_state must be a ModelState as return_state gives it, got list"):
        model(tokens, initial_state=list(state))


def test_unknown_arguments(model, tokens):
    calls = (model, model.run_with_cache, model.run_with_hooks, model.generate)
    for call in calls:
        with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
            call(tokens, atention_mask=None)
    with pytest.raises(ValueError, match="return_type must be 'logits', 'loss', 'both' or None, got 'logit'"):
        model(tokens, return_type="logit")
    model.tokenizer = lambda text, **options: {"input_ids": [1]}
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'middle'"):
        model("a", padding_side="middle")
    model.tokenizer = lambda text, **options: {"input_ids": []}
    with pytest.raises(ValueError, match="the prompt '' has no tokens; pass prepend_bos=True"):
        model("")


def test_generate_checks_its_mask(model, tokens):
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 4\], expected \[2, 6\]"):
        model.generate(tokens, attention_mask=torch.ones(2, 4), verbose=False)


def test_a_tokenizer_of_another_model(model):
    model.tokenizer = lambda text, **_: {"input_ids": [1, model.cfg.d_vocab]}
    with pytest.raises(
        IndexError, match=rf"token id {model.cfg.d_vocab} and the vocabulary has {model.cfg.d_vocab} rows"
    ):
        model("text")


def test_what_is_no_input(model, tokens):
    with pytest.raises(TypeError, match="expected text or token ids, got NoneType"):
        model(None)
    with pytest.raises(ValueError, match=r"expected text or token ids of shape .*, got torch.bool"):
        model(tokens > 3)
    for resid in (torch.zeros(1, 0, model.cfg.d_model), torch.zeros(1, 2, model.cfg.d_model, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"the residual stream is torch\.\w+ \[1, (0|2), .*expected floats"):
            model(resid, start_at_layer=0)


# Configs and families ----------------------------------------------------------------------------------------


def test_the_wrong_family(tmp_path):
    with pytest.raises(TypeError, match="HookedMamba takes a MambaConfig, got Mamba2Config"):
        HookedMamba(build("mamba2").cfg)
    with pytest.raises(TypeError, match="HookedMamba2 takes a Mamba2Config, got MambaConfig"):
        HookedMamba2(build("mamba").cfg)
    build("mamba2").save_pretrained(tmp_path / "m2")
    with pytest.raises(CheckpointError, match=r"is of the family 'mamba2', not 'mamba'.*HookedMamba2.from_pretrained"):
        HookedMamba.from_pretrained(tmp_path / "m2")
    with pytest.raises(CheckpointError, match="Mamba2ForCausalLM is of the family 'mamba2', not 'mamba'"):
        HookedMamba.from_hf(build("mamba2").to_hf())


def test_weights_that_are_not_finite(tmp_path):
    model = build("mamba")
    with torch.no_grad():
        model.blocks[1].mixer.D[2] = torch.nan
        model.blocks[0].norm.weight[0] = torch.inf
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError) as error:
        HookedMamba.from_pretrained(tmp_path / "nan")
    message = str(error.value)
    assert re.search(r"backbone.layers.1.mixer.D in model.safetensors has 1 NaN or infinite value", message)
    assert "backbone.layers.0.norm.weight" in message, "all of them in one error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, "d_model must be a positive integer, got 0"),
        ({"n_layers": 2.0}, "n_layers must be a positive integer, got 2.0"),
        ({"d_state": True}, "d_state must be a positive integer, got True"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"dt_min": 0.2}, "expected 0 < dt_min <= dt_max, got dt_min=0.2"),
        ({"dt_rank": 0}, "dt_rank must be a positive integer or None, got 0"),
        ({"d_vocab_unpadded": 99}, "d_vocab_unpadded must be from 1 to d_vocab=9, got 99"),
    ],
)
def test_configs_of_mamba(fields, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig(**({"d_model": 4, "n_layers": 1, "d_vocab": 9} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 3}, "d_inner=8 is not a multiple of head_dim=3"),
        ({"head_dim": 2, "n_groups": 3}, "4 heads cannot be shared evenly by n_groups=3"),
        ({"norm_groups": 3}, "d_inner=8 is not a multiple of norm_groups=3"),
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit must be \(low, high\) with 0 <= low <= high, got \(0.5, 0.1\)"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
    ],
)
def test_configs_of_mamba2(fields, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**({"d_model": 4, "n_layers": 1, "d_vocab": 9, "head_dim": 2} | fields))


def test_an_unknown_field():
    with pytest.raises(ValueError, match="MambaConfig has no field 'd_modle'; did you mean 'd_model'"):
        MambaConfig.from_dict({"d_modle": 3})
    with pytest.raises(TypeError, match="d_modle"):
        MambaConfig(d_modle=3)


@pytest.mark.parametrize("cfg", [build("falcon").cfg, build("mamba2-groups").cfg], ids=MAMBA)
def test_a_config_round_trip(cfg):
    assert type(cfg).from_dict(cfg.to_dict()) == cfg


def test_a_wrong_dtype(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    for wrong in ("float31", "int8", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be 'float32', .* got '{wrong}'"):
            type(model).from_pretrained(tmp_path / "m", dtype=wrong)


def test_what_a_newcomer_tries():
    model = build("mamba")
    tokens = tokens_for(model)
    with pytest.raises(HookNameError, match="the function matched none of the"):
        model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), lambda x, hook: x)])
    with pytest.raises(HookNameError, match="the function matched none of the"):
        model.run_with_cache(tokens, names_filter=lambda name: False)
    with pytest.raises(TypeError, match="fwd_hooks is a list of pairs"):
        model.run_with_hooks(tokens, fwd_hooks=("hook_embed", lambda x, hook: x))
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(KeyError, match="a name and a layer such as"):
        cache[0, "dt"]
    story = HookedMamba.from_pretrained("tinystories-4l")
    with pytest.raises(ValueError, match="' hungry' is one"):
        story.to_single_token("hungry")


def test_an_error_within_a_hook_says_where(unchecked):
    model = build("mamba")
    with pytest.raises(ZeroDivisionError) as caught:
        model.run_with_hooks(tokens_for(model), fwd_hooks=[("blocks.1.mixer.hook_dt", lambda dt, hook: 1 // 0)])
    assert caught.value.__notes__ == ["in a hook at blocks.1.mixer.hook_dt, whose value is float32 [2, 7, 20] on cpu"]


def test_a_name_that_is_misspelled():
    model = build("mamba")
    for wrong, right in (("resid_pots", "blocks.1.hook_resid_post"), ("y_gatd", "blocks.1.mixer.hook_y_gated")):
        with pytest.raises(HookNameError, match=rf"nearest: {re.escape(right)}"):
            model.site(model.act_name(wrong, 1))


def test_no_tokenizer_there(tmp_path):
    model = build("mamba")
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*nowhere: there is no such file or folder"):
        model.set_tokenizer(tmp_path / "nowhere")
    with pytest.raises((CheckpointError, OSError), match=r"no tokenizer loads from .*Give a folder"):
        model.set_tokenizer(tmp_path)
