"""Decompositions sum to what they decompose, and mean what they say."""

from __future__ import annotations

import pytest
import torch

from tests.hooked_mamba.analysis.models import TOLERANCE, every_family, model_for, plain_and_padded, run, two_families
from tests.hooked_mamba.tiny import relative, tokens_for


@every_family
@plain_and_padded
def test_resid_stacks_sum(family, dtype, padded):
    _, _, _, cache = run(family, dtype, padded)
    for layer in (0, 1, None):
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        accumulated, names = cache.accumulated_resid(layer, return_labels=True)
        assert len(labels) == len(parts)
        assert len(names) == len(accumulated)
        assert relative(parts.sum(0), accumulated[-1]) < TOLERANCE[dtype]
    assert names == ["0_pre", "1_pre", "final_post"]
    assert labels == ["embed", "0_mixer_out", "1_mixer_out"]


@every_family
@plain_and_padded
@pytest.mark.parametrize("apply_ln", [False, True])
def test_channels_embedding_and_biases_sum_to_the_stream(family, dtype, padded, apply_ln):
    _, _, _, cache = run(family, dtype, padded)
    for layer in (1, None):
        expected = cache.decompose_resid(layer, apply_ln=apply_ln).sum(0)
        for expand in (False, True):
            parts, labels = cache.get_full_resid_decomposition(
                layer, expand_channels=expand, apply_ln=apply_ln, return_labels=True
            )
            assert len(parts) == len(labels)
            assert labels[-2:] == ["embed", "bias"]
            assert relative(parts.sum(0), expected) < TOLERANCE[dtype]


@every_family
def test_logit_attributions_sum_to_the_logits(family):
    _model, tokens, logits, cache = run(family)
    answer, other = torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9])
    rows = torch.arange(3)
    for stack in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.stack_channel_results(-1, incl_remainder=True),
    ):
        attributions = cache.logit_attrs(stack, answer)  # one token per row, every position
        assert relative(attributions.sum(0), logits[rows, :, answer]) < 1e-12
        difference = cache.logit_attrs(stack, answer, other).sum(0)
        assert relative(difference, logits[rows, :, answer] - logits[rows, :, other]) < 1e-11
        assert relative(cache.logit_attrs(stack, 3).sum(0), logits[..., 3]) < 1e-12
        assert relative(cache.logit_attrs(stack, tokens).sum(0), logits.gather(-1, tokens[..., None])[..., 0]) < 1e-12
    last = cache.decompose_resid(pos_slice=-1)
    got = cache.logit_attrs(last, answer, pos_slice=-1)
    assert relative(got.sum(0), logits[rows, -1, answer]) < 1e-12
    one_row = cache.logit_attrs(cache.decompose_resid(), 3, batch_slice=slice(1, 2))
    assert relative(one_row.sum(0), logits[1:2, :, 3]) < 1e-12


@two_families
def test_remainder_is_the_embedding_and_the_biases(family):
    model, _, _, cache = run(family)
    units = cache.stack_channel_results(1, incl_remainder=True)
    expected = cache["embed"] + model.b_out[0]
    assert relative(units[-1], expected) < 1e-12


@pytest.mark.parametrize("family", ["mamba2", "mamba2-groups"])
def test_heads_are_their_channels(family):
    model, _, _, cache = run(family)
    heads, labels = cache.stack_head_results(return_labels=True)
    channels = cache.stack_channel_results()
    assert labels[0] == "L0H0"
    grouped = channels.unflatten(0, (-1, model.cfg.P)).sum(1)
    assert relative(heads, grouped) < 1e-13


def test_mamba1_has_no_heads():
    _, _, _, cache = run("mamba")
    with pytest.raises(ValueError, match="stack_channel_results"):
        cache.stack_head_results()


@every_family
@plain_and_padded
@pytest.mark.parametrize("source", ["scan", "token"])
def test_sources_sum_to_the_mixers_output(family, dtype, padded, source):
    model, _, _, cache = run(family, dtype, padded)
    for layer in range(2):
        parts, labels = cache.stack_source_results(layer, source, return_labels=True)
        assert len(parts) == len(labels) == 8
        assert relative(parts.sum(0), cache["out_proj", layer]) < TOLERANCE[dtype]
        # Nothing comes from the future.
        assert all(not parts[s, :, :s].any() for s in range(7))
    some = cache.stack_source_results(1, source, pos_slice=[5, 2])
    assert relative(some, parts[:, :, [5, 2]]) < TOLERANCE[dtype]
    direction = torch.randn(model.cfg.d_model, dtype=dtype)
    projected = cache.stack_source_results(1, source, pos_slice=6, project_output_onto=direction)
    assert relative(projected, parts[:, :, 6] @ direction) < TOLERANCE[dtype]


@every_family
@pytest.mark.parametrize("conv_bias", [False, True])
def test_sources_sum_with_and_without_biases(family, conv_bias):
    _, _, _, cache = run(family, conv_bias=conv_bias, use_bias=not conv_bias)
    for source in ("scan", "token"):
        assert relative(cache.stack_source_results(1, source).sum(0), cache["out_proj", 1]) < 1e-12


@every_family
def test_a_token_source_is_what_the_frozen_mixer_loses(family):
    """Against the definition: token s removed from the convolution's input, everything else frozen by hooks."""
    model, _tokens, _, cache = run(family)
    s = 2
    E = model.cfg.E
    resid = cache["resid_pre", 0]

    def frozen(name):
        return lambda value, hook: cache["blocks.0.mixer." + name]

    sigma = torch.sigmoid(cache["conv", 0])
    frozen_sites = ["hook_dt", "hook_B", "hook_C", "hook_gate"]

    def drop(value, hook):
        value[:, s, :E] = 0
        return value

    def linear_silu(value, hook):
        linear = hook.ctx["conv"] * sigma
        return linear[..., :E].reshape(value.shape)

    x = model.blocks[0].mixer.hook_x

    def keep_conv(value, hook):
        x.ctx["conv"] = value

    hooks = [(f"blocks.0.mixer.{name}", frozen(name)) for name in frozen_sites]
    hooks += [
        ("blocks.0.mixer.hook_x_pre", drop),
        ("blocks.0.mixer.hook_conv", keep_conv),
        ("blocks.0.mixer.hook_x", linear_silu),
    ]
    if family.startswith("mamba2"):
        hooks.append(("blocks.0.mixer.norm.hook_scale", lambda value, hook: cache["blocks.0.mixer.norm.hook_scale"]))
    with model.hooks(hooks):
        out = model(resid, start_at_layer=0, stop_at_layer=1) - resid
    expected = cache["out_proj", 0] - out
    assert relative(cache.stack_source_results(0, "token")[s], expected) < 1e-12


@two_families
def test_projection_equals_projecting(family):
    model, _, _, cache = run(family)
    directions = torch.randn(model.cfg.d_model, 2, dtype=torch.float64)
    for apply_ln in (False, True):
        full = cache.get_full_resid_decomposition(apply_ln=apply_ln)
        for onto in (directions, directions[:, 0]):
            got = cache.get_full_resid_decomposition(apply_ln=apply_ln, project_output_onto=onto)
            assert relative(got, full @ onto) < 1e-12


@two_families
def test_without_batch_axis_and_at_positions(family):
    model = model_for(family)
    tokens = tokens_for(model, rows=1)
    _, cache = model.run_with_cache(tokens)
    _, flat = model.run_with_cache(tokens, remove_batch_dim=True)
    calls = [
        lambda c, p: c.decompose_resid(pos_slice=p, apply_ln=True),
        lambda c, p: c.accumulated_resid(pos_slice=p),
        lambda c, p: c.get_full_resid_decomposition(pos_slice=p),
        lambda c, p: c.stack_source_results(1, "token", pos_slice=p),
    ]
    for call in calls:
        for pos in (None, 3, slice(2, 5), [4, 1]):
            assert relative(call(flat, pos), call(cache, pos)[:, 0]) < 1e-13
        assert call(cache, 3).ndim == call(cache, None).ndim - 1
    assert relative(flat.hidden_attention(1, 2, 3), cache.hidden_attention(1)[0, 2, 3]) < 1e-13
    assert relative(flat.compute_ssm_state(1, 3), cache.compute_ssm_state(1)[0, 3]) < 1e-13
    assert relative(flat.compute_ssm_effective_attention(0), cache.compute_ssm_effective_attention(0)[0]) < 1e-13


def test_wrong_arguments_name_what_is_right():
    _, _, _, cache = run("mamba")
    with pytest.raises(ValueError, match="two stages"):
        cache.decompose_resid(mlp_input=True)
    with pytest.raises(IndexError, match="from 0 to 2"):
        cache.decompose_resid(3)
    with pytest.raises(ValueError, match="differ in shape"):
        cache.logit_attrs(cache.decompose_resid(), torch.tensor([1, 2, 3]), 4)


def test_a_stack_of_other_positions_than_the_scale_is_refused():
    """Both would broadcast: the attributions of the last position by the scale of the first, silently."""
    _, _, logits, cache = run("mamba")
    parts = cache.decompose_resid(pos_slice=-1)
    with pytest.raises(ValueError, match=r"give the pos_slice and batch_slice that the stack was made with"):
        cache.logit_attrs(parts, 3)
    with pytest.raises(ValueError, match="pos_slice"):
        cache.apply_ln_to_stack(cache.decompose_resid(pos_slice=[0, 1]))
    assert relative(cache.logit_attrs(parts, 3, pos_slice=-1).sum(0), logits[:, -1, 3]) < 1e-10
