"""What a forward pass takes and gives: types of results, chosen layers, states, token ids."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import ModelState
from tests.hooked_mamba.tiny import build, relative
from tests.kinds import MAMBA

DTS = ["blocks.0.mixer.hook_dt", "blocks.1.mixer.hook_dt"]


@pytest.fixture(params=MAMBA)
def model(request):
    return build(request.param).double()


def test_return_types(model, tokens):
    logits = model(tokens)
    assert logits.shape == (2, 6, model.cfg.d_vocab)
    assert model(tokens, return_type=None) is None
    loss = model(tokens, return_type="loss")
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert relative(loss, expected) < 1e-12
    both = model(tokens, return_type="both")
    assert torch.equal(both.logits, logits)
    assert torch.equal(both.loss, loss)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (2, 5)
    assert relative(per_token.mean(), loss) < 1e-12
    out, state = model(tokens, return_type="both", return_state=True)
    assert torch.equal(out.loss, loss)
    assert isinstance(state, ModelState)
    assert len(state) == model.cfg.n_layers
    assert state.batch == 2
    assert relative(model.loss_fn(logits, tokens), loss) < 1e-12
    one_row = model(tokens[0])
    assert one_row.shape == (1, 6, model.cfg.d_vocab)
    assert torch.equal(model(tokens.tolist()), logits)
    assert torch.equal(model(tokens.int()), logits)


def test_start_and_stop(model, tokens):
    _, cache = model.run_with_cache(tokens)
    logits = model(tokens)
    for layer in (0, 1):
        resid = model(tokens, stop_at_layer=layer)
        assert torch.equal(resid, cache["resid_pre", layer])
        assert torch.equal(model(resid, start_at_layer=layer), logits)
        assert torch.equal(model(tokens, stop_at_layer=layer - 2), resid)
        loss = model(resid, start_at_layer=layer, tokens=tokens, return_type="loss")
        assert torch.equal(loss, model(tokens, return_type="loss"))
    assert torch.equal(model(tokens, stop_at_layer=2), cache["resid_post", 1])
    middle = model(cache["resid_pre", 0], start_at_layer=0, stop_at_layer=1)
    assert torch.equal(middle, cache["resid_post", 0])
    fired = []
    hooks = [("hook_*", lambda v, hook: fired.append(hook.name))]
    model.run_with_hooks(cache["resid_pre", 1], start_at_layer=1, fwd_hooks=hooks)
    assert fired == ["hook_logits"]
    with model.hooks(fwd_hooks=[(DTS[1], lambda v, hook: v * 2)]):
        assert torch.equal(model(tokens, stop_at_layer=1), cache["resid_post", 0])


def test_states_keep_no_more_than_they_need(model, tokens):
    """Going on from a state must not keep the inputs of a long prompt alive."""
    with torch.no_grad():
        _, state = model(tokens.repeat(1, 20), return_state=True)
    for layer in state:
        for part in layer:
            assert part.untyped_storage().nbytes() == part.nbytes


def test_a_state_of_the_materialised_path_keeps_no_more_than_it_needs(model, tokens):
    hooks = [("blocks.*.mixer.hook_A_bar", lambda v, hook: v)]
    with torch.no_grad():
        _, state = model.run_with_hooks(tokens, return_state=True, fwd_hooks=hooks)
    for layer in state:
        for part in layer:
            assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_token_ids_of_any_integer_type(model, tokens, dtype):
    assert torch.equal(model(tokens.to(dtype), return_type="loss"), model(tokens, return_type="loss"))


def test_a_token_is_sought_in_one_row(model):
    assert model.get_token_position(3, [1, 3, 3]) == 1
    assert model.get_token_position(3, torch.tensor([[1, 3, 3]]), mode="last") == 2
    with pytest.raises(ValueError, match=r"takes one row of tokens, got \[2, 2\]"):
        model.get_token_position(3, torch.tensor([[1, 2], [3, 4]]))


def test_residual_directions_of_a_list(model):
    assert torch.equal(model.tokens_to_residual_directions([1, 2]), model.W_U[:, [1, 2]].t())
