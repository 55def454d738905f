"""Patching sweeps are their single runs, done side by side."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hooked_mamba import patching
from hooked_mamba.analysis.attribution_patching import attribution_patch, correlation, like
from hooked_mamba.analysis.path_patching import path_patch
from tests.hooked_mamba.analysis.models import MASK, every_family, model_for, run, two_families
from tests.hooked_mamba.tiny import relative, tokens_for


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def pair(family, **changes):
    """(model, clean tokens, corrupted tokens that differ in two places, clean cache)."""
    model = model_for(family, **changes)
    clean = tokens_for(model, rows=2)
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % model.cfg.d_vocab
    corrupted[:, 4] = (corrupted[:, 4] + 5) % model.cfg.d_vocab
    return model, clean, corrupted, model.run_with_cache(clean)[1]


@two_families
def test_everything_restores_the_clean_logits_and_nothing_changes_nothing(family):
    model, clean, corrupted, cache = pair(family)
    everything = [(name, lambda value, hook: cache[hook.name]) for name in ("blocks.0.hook_resid_pre",)]
    assert torch.equal(model.run_with_hooks(corrupted, fwd_hooks=everything), model(clean))
    names = [f"blocks.{i}.mixer.hook_{s}" for i in range(2) for s in ("x", "dt", "B", "C", "gate", "out_proj")]
    full = [("hook_embed", lambda value, hook: cache["hook_embed"])]
    full += [(name, lambda value, hook: cache[hook.name]) for name in names]
    assert torch.equal(model.run_with_hooks(corrupted, fwd_hooks=full), model(clean))
    _, own = model.run_with_cache(corrupted)
    same = patching.get_act_patch_site_every(model, corrupted, own, metric, ("resid_pre", "conv", "dt"), progress=False)
    assert relative(same, metric(model(corrupted)).expand_as(same)) < 1e-11


@two_families
@pytest.mark.parametrize("site", ["resid_pre", "x_pre", "dt", "C", "out_proj"])
def test_layer_by_position_sweeps(family, site):
    model, _, corrupted, cache = pair(family)
    sweep = getattr(patching, f"get_act_patch_{site}")
    result, indices = sweep(model, corrupted, cache, metric, progress=False, batch_size=6, return_index_df=True)
    assert result.shape == (2, 7)
    assert indices[8] == (1, 1)
    for layer, pos in ((0, 2), (0, 4), (1, 6)):
        name = patching_name(site, layer)

        def edit(value, hook, pos=pos):
            value[:, pos] = cache[hook.name][:, pos]
            return value

        expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, edit)]))
        assert result[layer, pos].item() == pytest.approx(expected.item(), rel=1e-9)


def patching_name(site, layer):
    return f"blocks.{layer}.{'' if site.startswith('resid') else 'mixer.'}hook_{site}"


@every_family
def test_channel_head_and_state_sweeps(family):
    model, _, corrupted, cache = pair(family)
    channels = patching.get_act_patch_channel_all_pos(model, corrupted, cache, metric, progress=False)
    assert channels.shape == (2, model.cfg.E)

    def unit(value, hook):
        value[:, :, 3] = cache[hook.name][:, :, 3]

    expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.mixer.hook_y_gated", unit)]))
    assert channels[1, 3].item() == pytest.approx(expected.item(), rel=1e-9)

    states = patching.get_act_patch_state(model, corrupted, cache, metric, progress=False)
    dims = patching.get_act_patch_state_dim(model, corrupted, cache, metric, progress=False)
    assert dims.shape == (2, 7, model.cfg.d_state)
    _, full = model.run_with_cache(model_tokens(cache), names_filter="blocks.*.mixer.hook_h")
    state = full["h", 1]
    whole = [("blocks.1.mixer.hook_h.4", lambda value, hook: state[:, 4])]
    assert states[1, 4].item() == pytest.approx(
        metric(model.run_with_hooks(corrupted, fwd_hooks=whole)).item(), rel=1e-9
    )

    def one(value, hook):
        value[..., 2] = state[:, 4, ..., 2]

    got = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.mixer.hook_h.4", one)]))
    assert dims[1, 4, 2].item() == pytest.approx(got.item(), rel=1e-9)
    if family.startswith("mamba2"):
        heads = patching.get_act_patch_head_out_by_pos(model, corrupted, cache, metric, progress=False)
        assert heads.shape == (2, 7, model.cfg.H)

        def head(value, hook):
            value[:, 4, 1] = cache[hook.name][:, 4, 1]

        got = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.mixer.hook_y", head)]))
        assert heads[0, 4, 1].item() == pytest.approx(got.item(), rel=1e-9)


def model_tokens(cache):
    return cache["tokens"]


def test_own_indices_rows_of_metrics_padding_and_errors():
    model, _clean, corrupted, cache = pair("mamba")
    flat = patching.get_act_patch_resid_pre(
        model, corrupted, cache, metric, index_df=[(1, 2), (0, 4), (1, 4)], progress=False
    )
    whole = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False)
    assert relative(flat, whole[[1, 0, 1], [2, 4, 4]]) < 1e-10
    rows = patching.get_act_patch_resid_pre(
        model, corrupted, cache, lambda x: x[:, -1, 3] - x[:, -1, 5], progress=False
    )
    assert relative(rows.mean(-1), whole) < 1e-12
    figure = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False, return_figure=True)[1]
    assert relative(torch.as_tensor(figure.data[0].z), whole) < 1e-6

    model, tokens, _, padded = run("mamba", padded=True)
    other = (tokens + 1) % model.cfg.d_vocab
    got = patching.get_act_patch_out_proj(model, other, padded, metric, attention_mask=MASK, progress=False)
    hook = [
        ("blocks.1.mixer.hook_out_proj", lambda v, hook: patching.layer_pos_patch_setter(v, (1, 3), padded[hook.name]))
    ]
    expected = metric(model.run_with_hooks(other, fwd_hooks=hook, attention_mask=MASK))
    assert got[1, 3].item() == pytest.approx(expected.item(), rel=1e-9)

    with pytest.raises(ValueError, match="same length"):
        patching.get_act_patch_resid_pre(model, other[:, :5], padded, metric, progress=False)
    with pytest.raises(ValueError, match="no index axis is named 'head'"):
        patching.get_act_patch_head_out_all_pos(model, other, padded, metric, progress=False)


@two_families
def test_attribution_patching_is_the_derivative_of_patching(family):
    """For a small difference the estimate is the patch, to second order."""
    model, _clean, corrupted, cache = pair(family)
    _, own = model.run_with_cache(corrupted)
    tiny = 1e-5
    near = type(cache)(
        {n: own[n] + tiny * (cache[n] - own[n]) if v.is_floating_point() else v for n, v in own.items()}, model
    )
    base = metric(model(corrupted))
    for sweep in (
        patching.get_act_patch_resid_pre,
        patching.get_act_patch_dt,
        patching.get_act_patch_channel_all_pos,
    ):
        exact = sweep(model, corrupted, near, metric, progress=False) - base
        estimate = like(sweep, model, corrupted, near, metric) - base
        assert estimate.shape == exact.shape
        assert relative(estimate, exact) < 1e-3
    assert not any(p.grad is not None for p in model.parameters())


@two_families
def test_attribution_of_states_against_finite_differences(family):
    model, _, corrupted, cache = pair(family)
    estimate = like(patching.get_act_patch_state, model, corrupted, cache, metric)
    dims = like(patching.get_act_patch_state_dim, model, corrupted, cache, metric)
    base = metric(model(corrupted))
    assert relative((dims - base).sum(-1), estimate - base) < 1e-10
    clean, own = cache.compute_ssm_state(1), model.run_with_cache(corrupted)[1].compute_ssm_state(1)
    step = 1e-6 * (clean - own)[:, 3]
    up = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.mixer.hook_h.3", lambda h, hook: h + step)]))
    down = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.mixer.hook_h.3", lambda h, hook: h - step)]))
    assert (estimate - base)[1, 3].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-5)


def test_correlation():
    a = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert correlation(a, 3 - 2 * a) == pytest.approx(-1)
    with pytest.raises(ValueError, match="constant"):
        correlation(a, torch.ones(2, 2))
    model, _, corrupted, cache = pair("mamba")
    with pytest.raises(ValueError, match="no index axis"):
        attribution_patch(model, corrupted, cache, metric, "resid_pre", ("layer", "place"))


@two_families
@pytest.mark.parametrize("site", ["out_proj", "z"])
def test_path_patching_by_the_textbook(family, site):
    """Sender patched, all other mixers frozen, the receiver's value taken, and patched alone into a second run."""
    model, _, corrupted, cache = pair(family, n_layers=3)
    _, own = model.run_with_cache(corrupted)
    result = path_patch(model, corrupted, cache, metric, receiver_site=site, progress=False)
    assert result.shape == (4, 4)
    assert torch.isnan(result[2:, 0]).all()

    def put(source, name):
        return name, lambda value, hook: source[name]

    sender, receiver = "blocks.0.mixer.hook_out_proj", f"blocks.2.mixer.hook_{site}"
    freeze = put(own, "blocks.1.mixer.hook_out_proj")
    _, seen = model.run_with_cache(corrupted, fwd_hooks=[put(cache, sender), freeze], names_filter=receiver)
    expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[put(seen, receiver)]))
    assert result[1, 2].item() == pytest.approx(expected.item(), rel=1e-5)

    frozen = [put(own, f"blocks.{i}.mixer.hook_out_proj") for i in range(3) if i != 1]
    direct = metric(model.run_with_hooks(corrupted, fwd_hooks=[*frozen, put(cache, "blocks.1.mixer.hook_out_proj")]))
    assert result[2, 3].item() == pytest.approx(direct.item(), rel=1e-5)


@two_families
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_path_patching_in_small_batches_is_the_same(family, batch_size):
    model, _, corrupted, cache = pair(family, n_layers=3)
    rows = []

    def counted(logits):
        assert logits.shape[0] == 2
        return metric(logits)

    watch = ("hook_logits", lambda value, hook: rows.append(value.shape[0]))
    whole = path_patch(model, corrupted, cache, counted, progress=False)
    with model.hooks([watch]):
        parts = path_patch(model, corrupted, cache, counted, progress=False, batch_size=batch_size)
    assert max(rows[2:]) <= max(2, batch_size)
    torch.testing.assert_close(parts, whole, equal_nan=True)


@pytest.mark.parametrize(
    ("family", "site", "axis", "has"),
    [
        ("mamba2", "y", "channel", "it has head"),
        ("mamba2", "mixer.z", "head", "it has channel"),
        ("mamba2", "x_pre", "channel", "it has no units"),
        ("mamba", "B", "channel", "it has state"),
        ("mamba", "resid_pre", "channel", "it has no units"),
        ("mamba2", "h", "channel", "it has head, state"),
    ],
)
def test_an_axis_that_a_site_lacks_is_named(family, site, axis, has):
    model, _, corrupted, cache = pair(family)
    setter = patching.layer_head_vector_patch_setter
    with pytest.raises(ValueError, match=has):
        patching.generic_activation_patch(model, corrupted, cache, metric, setter, site, ("layer", axis))
    with pytest.raises(ValueError, match=f"no axis '{axis}'"):
        attribution_patch(model, corrupted, cache, metric, site, ("layer", axis))


def test_an_index_that_does_not_fit_is_named():
    model, _, corrupted, cache = pair("mamba2")
    setter = patching.layer_head_vector_patch_setter
    with pytest.raises(IndexError, match=r"index \(0, 99\)"):
        patching.generic_activation_patch(
            model, corrupted, cache, metric, setter, "y", index_df=[(0, 99)], progress=False
        )


def test_ready_made_sweeps_are_documented():
    sweeps = [getattr(patching, name) for name in dir(patching) if name.startswith("get_act_patch_")]
    assert all("Called as sweep" in s.__doc__ for s in sweeps if isinstance(s, partial))
    assert len(sweeps) > 20


def test_negative_indices_are_the_last_real_ones():
    model, _, corrupted, cache = pair("mamba", n_layers=3)
    options = {"index_axis_names": ("layer", "pos"), "progress": False}
    whole = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, progress=False)
    length = corrupted.shape[1]

    def some(indices, tokens=corrupted, mask=None, **more):
        return patching.generic_activation_patch(
            model, tokens, cache, metric, patching.layer_pos_patch_setter, "resid_pre", index_df=indices,
            attention_mask=mask, **(options | more),
        )  # fmt: skip

    assert relative(some([(-1, -2)]), whole[2:3, length - 2]) < 1e-12
    right = torch.ones_like(corrupted)
    right[0, -2:] = 0
    with pytest.raises(ValueError, match=r"rows are padded on the right.*position -1 of all"):
        some([(0, -1)], mask=right)
    with pytest.raises(ValueError, match="name the axes"):
        some([(0, -1)], mask=right, index_axis_names=None)
    both = right.clone()
    both[:, -2:] = 0  # all rows end at the same column: that is their last one
    assert torch.equal(some([(0, -1)], mask=both), some([(0, length - 3)], mask=both))
    with pytest.raises(IndexError, match="layer 3 is out of range for a model of 3 layers"):
        some([(3, 0)])
