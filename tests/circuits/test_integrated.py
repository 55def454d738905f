"""Integrated gradients: they sum, converge, and find what acts by selection alone."""

from __future__ import annotations

import pytest
import torch

from circuits import Channel, FrozenModel, Logit, build_graph, integrated_gradients, node_effects
from circuits.faithfulness import recovery
from circuits.keep import Keep, only
from saes import SparseCoder, mambacoder_config, sae_config
from tests.circuits.models import random_model, random_tokens
from tests.kinds import MAMBA


@pytest.mark.parametrize("family", MAMBA)
def test_embeddings_sum_to_the_way_from_the_baseline(family):
    model, tokens = random_model(7, family, n_layers=2), random_tokens(7, batch=2, length=6)
    origin = model.embed.weight.detach()[5]
    targets = [Logit(3), Logit((1, 2), minus=[4, 5])]
    errors = [
        integrated_gradients(model, tokens, targets, baseline=origin, steps=steps).residual.abs().max()
        for steps in (2, 128)
    ]
    assert errors[1] < 1e-8
    assert errors[0] > 1e-3
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    frozen = FrozenModel(model, tokens, attention_mask=mask)
    padded = integrated_gradients(frozen, targets=Logit(3), baseline=origin, steps=4)
    alone = integrated_gradients(model, tokens[1:, 2:], Logit(3), baseline=origin, steps=4)
    assert torch.allclose(padded.embeddings[1, 2:], alone.embeddings[0], atol=1e-9)
    assert padded.embeddings[1, :2].abs().max() == 0


def test_what_embeddings_are_not_integrated_for(unchecked):
    model, tokens = random_model(7, "mamba", n_layers=1), random_tokens(7, length=4)
    with pytest.raises(ValueError, match="no target"):
        integrated_gradients(model, tokens, [])
    for targets in (Channel(0, 1, 2), [Logit(3), Channel(0, 1, 2)]):
        with pytest.raises(ValueError, match=r"targets must be a Logit or several, got \["):
            integrated_gradients(model, tokens, targets)
    with pytest.raises(ValueError, match=r"must be an embedding \[\d+\], got \[3\]"):
        integrated_gradients(model, tokens, Logit(3), baseline=torch.zeros(3))
    with pytest.raises(ValueError, match="give a model and a prompt, or a FrozenModel alone"):
        integrated_gradients(model, targets=Logit(3))


def coders_of(model):
    d = model.cfg.d_model
    sae = SparseCoder(sae_config("blocks.0.mixer.hook_out_proj", d, 12, k=3), seed=1)
    local = SparseCoder(mambacoder_config(1, d, 12, architecture="topk", k=3, target="local"), seed=2)
    return [sae.double(), local.double()]


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("coded", [False, True])
def test_nodes_sum_to_what_ablating_everything_loses(family, coded):
    model, tokens = random_model(3, family, n_layers=3), random_tokens(2, length=6)
    coders = coders_of(model) if coded else []
    frozen = FrozenModel(model, tokens, coders)
    reference = FrozenModel(model, random_tokens(9, batch=4, length=6), coders)

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 2]

    coarse, fine = (node_effects(frozen, metric, reference=reference, steps=steps) for steps in (2, 32))
    assert abs(fine.residual) < 1e-9 < abs(coarse.residual)
    assert set(fine.heads) == ({1, 2} if coded else {0, 1, 2})
    assert set(fine.features) == ({0, 1} if coded else set())
    with torch.no_grad():
        with only(frozen, Keep.nothing(frozen), reference) as ablated:
            assert float(metric(ablated(tokens))[0]) == fine.none
        with only(frozen, Keep.everything(frozen), reference) as same:
            assert abs(float(metric(same(tokens))[0]) - fine.whole) < 1e-12


def test_the_largest_are_kept():
    model, tokens = random_model(2, "mamba", n_layers=2), random_tokens(2, length=6)
    frozen = FrozenModel(model, tokens)
    effects = node_effects(frozen, lambda logits: logits[:, -1, 3])
    keep = effects.largest(7)
    assert len(keep) == 7
    sizes = torch.stack([effects.heads[i] for i in (0, 1)]).abs()
    mask = torch.stack([keep.heads[i] for i in (0, 1)])
    assert sizes[mask].min() >= sizes[~mask].max()
    assert len(effects.largest(10**6)) <= sizes.numel()
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        effects.largest(-1)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        node_effects(frozen, lambda logits: logits[:, -1, 3], steps=0)
    with pytest.raises(ValueError, match="expected one prompt, got 2"):
        node_effects(FrozenModel(model, random_tokens(1, batch=2)), lambda logits: logits[:, -1, 3])


def test_runs_that_are_no_whole_prompt_are_refused():
    model, tokens = random_model(2, "mamba", n_layers=2), random_tokens(2, length=6)
    with torch.no_grad():
        _, past = model(random_tokens(3), return_state=True)
    refused = {
        "is padded": FrozenModel(model, tokens, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])),
        "continues from an initial state": FrozenModel(model, tokens, initial_state=past),
    }
    for match, frozen in refused.items():
        with pytest.raises(ValueError, match=match):
            node_effects(frozen, lambda logits: logits[:, -1, 3])
        with pytest.raises(ValueError, match=match):
            recovery(frozen, Keep.everything(frozen), lambda logits: logits[:, -1, 3])
    empty = FrozenModel(model, tokens, attention_mask=torch.ones(1, 6), initial_state=None)
    assert node_effects(empty, lambda logits: logits[:, -1, 3], steps=1).whole == float(empty.logits[0, -1, 3])


def test_a_graph_of_chosen_nodes_has_no_ends_that_add_nothing():
    model, tokens = random_model(2, "mamba", n_layers=2), random_tokens(2, length=6)
    frozen = FrozenModel(model, tokens)
    keep = node_effects(frozen, lambda logits: logits[:, -1, 3], steps=1).largest(7)
    graph = build_graph(frozen, Logit(3), keep=keep)
    assert int(graph.where("head").sum()) == 7
    assert not graph.where("initial").any()  # nothing was before the first position
