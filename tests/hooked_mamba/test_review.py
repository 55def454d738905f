"""Small promises that a reader of the code found untested."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mamba import ActivationCache
from hooked_mamba.hooks.names import HookNameError
from tests.hooked_mamba.tiny import build, tokens_for

pytestmark = pytest.mark.usefixtures("unchecked")
DT = "blocks.0.mixer.hook_dt"


@pytest.fixture(params=["mamba", "mamba2"])
def model(request):
    return build(request.param)


@pytest.fixture
def tokens(model):
    return tokens_for(model, rows=2, length=6)


def test_a_cache_tells_what_was_not_cached_from_what_does_not_exist(model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=DT)
    assert isinstance(cache, ActivationCache)
    with pytest.raises(KeyError, match=r"blocks.0.mixer.hook_h.4 was not cached"):
        cache["h.4", 0]
    with pytest.raises(
        HookNameError, match=rf"'blocks.1.mixer.hook_dtt'.* has {len(model.hook_dict)} sites in 2 blocks"
    ):
        cache["dtt", 1]


def test_aliases_in_globs(model, tokens):
    _, cache = model.run_with_cache(
        tokens, names_filter=["blocks.*.hook_delta", "blocks.*.hook_ssm_out", "blocks.*.hook_h.2"]
    )
    sites = ("hook_dt", "hook_out_proj", "hook_h.2")
    assert set(cache) == {f"blocks.{i}.mixer.{site}" for i in range(model.cfg.n_layers) for site in sites}


def test_a_hook_point_is_no_predicate(model, tokens):
    point = model.hook_point(DT)
    calls = (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(point, lambda v, hook: v * 0)]),
        lambda: model.run_with_cache(tokens, names_filter=point),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"holds names, got the hook point {DT}"):
            call()


@pytest.mark.parametrize("with_edit", [False, True])
def test_no_positions(model, tokens, with_edit):
    hooks = [("blocks.0.mixer.hook_h.1", lambda h, hook: h * 2)] if with_edit else []
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.*", pos_slice=slice(6, None), fwd_hooks=hooks)
    assert "blocks.0.mixer.hook_h" in cache
    assert {value.shape[1] for value in cache.values()} == {0}


def test_a_state_of_the_materialised_path_keeps_no_more_than_it_needs(model, tokens):
    hooks = [("blocks.*.mixer.hook_A_bar", lambda v, hook: v)]
    with torch.no_grad():
        _, state = model.run_with_hooks(tokens, return_state=True, fwd_hooks=hooks)
    for layer in state:
        for part in layer:
            assert part.untyped_storage().nbytes() == part.nbytes


def test_positions_as_numpy_gives_them(model, tokens):
    _, whole = model.run_with_cache(tokens, names_filter=DT)
    for position in (np.int64(2), np.array([0, 3]), np.arange(2)):
        _, cache = model.run_with_cache(tokens, names_filter=DT, pos_slice=position)
        assert torch.equal(cache[DT], whole[DT][:, position])


def test_a_token_is_sought_in_one_row(model):
    assert model.get_token_position(3, [1, 3, 3]) == 1
    assert model.get_token_position(3, torch.tensor([[1, 3, 3]]), mode="last") == 2
    with pytest.raises(ValueError, match=r"takes one row of tokens, got \[2, 2\]"):
        model.get_token_position(3, torch.tensor([[1, 2], [3, 4]]))


def test_residual_directions_of_a_list(model):
    assert torch.equal(model.tokens_to_residual_directions([1, 2]), model.W_U[:, [1, 2]].t())


def test_generate_checks_its_mask(model, tokens):
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 4\], expected \[2, 6\]"):
        model.generate(tokens, attention_mask=torch.ones(2, 4), verbose=False)


def test_a_tokenizer_of_another_model(model):
    model.tokenizer = lambda text, **_: {"input_ids": [1, model.cfg.d_vocab]}
    with pytest.raises(
        IndexError, match=rf"token id {model.cfg.d_vocab} and the vocabulary has {model.cfg.d_vocab} rows"
    ):
        model("text")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_token_ids_of_any_integer_type(model, tokens, dtype):
    assert torch.equal(model(tokens.to(dtype), return_type="loss"), model(tokens, return_type="loss"))


def test_what_is_no_input(model, tokens):
    with pytest.raises(TypeError, match="expected text or token ids, got NoneType"):
        model(None)
    with pytest.raises(ValueError, match=r"expected text or token ids of shape .*, got torch.bool"):
        model(tokens > 3)
    for resid in (torch.zeros(1, 0, model.cfg.d_model), torch.zeros(1, 2, model.cfg.d_model, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"the residual stream is torch\.\w+ \[1, (0|2), .*expected floats"):
            model(resid, start_at_layer=0)


def test_gradients_follow_the_weights_that_stay_float32(model, tokens):
    model(tokens, return_type="loss").backward()
    model.bfloat16()
    assert all(p.grad.dtype is p.dtype for p in model.parameters())
    torch.optim.AdamW(model.parameters()).step()
