"""Sweeps leave out what cannot differ: layers below a patch, positions before it, logits that no one reads."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import patching
from hooked_mamba.analysis import patch_runs
from hooked_mamba.analysis.patch_runs import Patch, run_patches
from hooked_mamba.analysis.read_positions import read_positions, read_tokens
from tests.hooked_mamba.tiny import build, tokens_for
from tests.kinds import MIXERS

LENGTH = 9


def lead(logits):
    return logits[:, -1, 3] - 2 * logits[:, 4, 5]


def by_hand(model, corrupted, cache, site, index, metric):
    """One patch in a whole pass of its own."""
    layer, pos = index

    def edit(value, hook):
        value[:, pos] = cache[site, layer][:, pos]
        return value

    with torch.no_grad():
        return metric(model.run_with_hooks(corrupted, fwd_hooks=[(model.act_name(site, layer), edit)]))


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("kind", MIXERS)
def test_every_patch_equals_a_whole_pass(kind, batch_size, monkeypatch):
    monkeypatch.setattr(patch_runs, "_firsts", lambda patches, starts, length: [0, 3, 6])
    model = build(kind).double()
    clean, corrupted = tokens_for(model, 2, LENGTH, seed=0), tokens_for(model, 2, LENGTH, seed=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    site = "resid_pre"
    result = patching.get_act_patch_resid_pre(model, corrupted, cache, lead, batch_size=batch_size, progress=False)
    assert result.shape == (model.cfg.n_layers, LENGTH, 2)
    for layer in range(model.cfg.n_layers):
        for pos in range(LENGTH):
            expected = by_hand(model, corrupted, cache, site, (layer, pos), lead)
            assert torch.allclose(result[layer, pos], expected, rtol=0, atol=1e-10), (layer, pos)


def test_patches_in_any_order_and_at_any_place():
    model = build("mamba").double()
    tokens = tokens_for(model, 1, LENGTH, seed=2)
    sites = ["blocks.1.hook_resid_pre", "hook_embed", "ln_final.hook_out", "blocks.0.hook_resid_pre", "hook_logits"]

    def double(value):
        return value * 2

    patches = [Patch(site, double) for site in sites]
    found = run_patches(model, tokens, patches, lead, progress=False)
    with torch.no_grad():
        expected = [
            lead(model.run_with_hooks(tokens, fwd_hooks=[(site, lambda value, hook: value * 2)])) for site in sites
        ]
    assert torch.allclose(found, torch.stack(expected), rtol=0, atol=1e-10)


def test_functions_on_the_way_see_whole_prompts():
    model = build("mamba").double()
    tokens, seen = tokens_for(model, 1, LENGTH, seed=2), set()
    patches = [Patch("blocks.1.hook_resid_pre", lambda value, first: value, position=6)]
    with model.hooks([("blocks.1.hook_resid_post", lambda value, hook: seen.add(value.shape[1]))]):
        run_patches(model, tokens, patches, lead, progress=False)
    assert seen == {LENGTH}


@pytest.mark.parametrize(
    ("metric", "reads"),
    [
        (lambda x: x[:, -1, 3] - x[:, -1, 2], [5]),
        (lambda x: x[:, [1, 4]].logsumexp(-1).sum(1), [1, 4]),
        (lambda x: x.logsumexp(-1).mean(), [0, 1, 2, 3, 4, 5]),
        (lambda x: (x[:, 2, 0] > 0).float(), [0, 1, 2, 3, 4, 5]),  # no gradient
        (lambda x: torch.where(x[:, 2, 0] > 0, x[:, 5, 1], x[:, 5, 2]), [0, 1, 2, 3, 4, 5]),  # reads more than it has
        (lambda x: x[:, 5, 1] + (x[:, 2, 0] - 100).relu(), [0, 1, 2, 3, 4, 5]),  # a gradient elsewhere only
        (lambda x: torch.tensor(float(x[0, 3, 1])), [0, 1, 2, 3, 4, 5]),  # leaves torch
        (lambda x: x[:, 5, 1].detach(), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_a_metric_reads(metric, reads):
    logits = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0))
    assert read_positions(metric, logits) == reads


def test_positions_may_be_given():
    model = build("mamba").double()
    clean, corrupted = tokens_for(model, 1, LENGTH, seed=0), tokens_for(model, 1, LENGTH, seed=1)
    _, cache = model.run_with_cache(clean)
    seen = []

    def metric(logits):
        seen.append(logits)
        return logits[:, -1, 3].detach()

    options = {"positions": [-1], "progress": False}
    found = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, **options)
    assert all(logits[:, :-1].isnan().all() for logits in seen)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("metric", "reads"),
    [
        (lambda x: x[:, -1, 3] - x[:, 2, 1], [1, 3]),
        (lambda x: x[:, -1, [3, 1, 5]].amax(-1), None),  # a gradient to the largest only
        (lambda x: x[:, -1, 3] - x[:, -1].logsumexp(-1), None),
        (lambda x: x[:, -1, :9].sum(-1), None),  # too many
        (lambda x: torch.where(x[:, -1, 4] > 0, x[:, -1, 3], x[:, -1, 2]), None),  # reads more than its gradient shows
        (lambda x: x[:, -1, 3].detach(), None),
    ],
)
def test_of_which_tokens(metric, reads):
    logits = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))
    assert read_tokens(metric, logits, [2, 5]) == reads


@pytest.mark.parametrize("kind", MIXERS)
def test_logits_are_formed_where_they_are_read(kind, monkeypatch):
    model = build(kind).double()
    clean, corrupted = tokens_for(model, 2, LENGTH, seed=0), tokens_for(model, 2, LENGTH, seed=1)
    _, cache = model.run_with_cache(clean)
    formed = []
    monkeypatch.setattr(
        model, "to_logits", lambda *given: formed.append(type(model).to_logits(model, *given)) or formed[-1]
    )
    patching.get_act_patch_resid_pre(model, corrupted, cache, lead, progress=False)
    base, *others = formed  # of the run that patches change, then of patches
    assert base.shape[2] == model.cfg.d_vocab
    assert others
    assert all(logits.shape[2] == 2 for logits in others)
