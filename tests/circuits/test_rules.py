"""Selection followed by other rules: complete where they promise it, and against differences of the real model."""

from __future__ import annotations

import pytest
import torch

from circuits import Channel, Direction, FrozenModel, Logit, attribute, build_graph, patch_effects
from hooked_mamba.state import ModelState
from saes import SparseCoder, mambacoder_config
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for
from tests.kinds import MAMBA


def targets_of(model):
    vector = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    return [Logit(3, minus=2), Direction(vector, 0, 3, "out"), Channel(model.cfg.n_layers - 1, 1, 4)]


STARTS = ("empty", "padded", "with a past")


@pytest.mark.parametrize(
    ("seed", "start"),
    [
        pytest.param(seed, start, marks=[] if seed % 3 == i else pytest.mark.slow)
        for seed in range(8)
        for i, start in enumerate(STARTS)
    ],
)
def test_half_and_shares_sum_to_their_targets(seed, start):
    model, tokens = random_model(seed), random_tokens(seed, batch=2, length=6)
    run = {}
    if start == "padded":
        run = {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    elif start == "with a past":
        run = {"initial_state": model(random_tokens(seed + 9, batch=2), return_state=True)[1].detach()}
    targets = targets_of(model)
    values = attribute(FrozenModel(model, tokens, **run), targets=targets)
    for selection in ("half", "shares", (0.5, 0.2, 0.3)):
        found = attribute(FrozenModel(model, tokens, selection=selection, **run), targets=targets)
        assert found.residual.abs().max() < 1e-10
        assert torch.allclose(found.target, values.target)
        assert not torch.allclose(found.embeddings[:4], values.embeddings[:4])
    same = attribute(FrozenModel(model, tokens, selection=(0.0, 0.0, 1.0), **run), targets=targets)
    for name in ("embeddings", "biases", "initial", "heads", "token_heads"):
        a, b = getattr(same, name), getattr(values, name)
        pairs = [(a, b)] if isinstance(a, torch.Tensor) else [(a[i], b[i]) for i in b]
        assert all(torch.allclose(x, y, atol=1e-10) for x, y in pairs), name


def difference(model, tokens, name, scaled, token=3, step=1e-5, **run):
    """The slope of the last logit when a function scales a site."""

    def logit(scale):
        with torch.no_grad():
            return float(
                model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: scaled(x, scale))], **run)[0, -1, token]
            )

    return (logit(1 + step) - logit(1 - step)) / (2 * step)


@pytest.mark.parametrize("family", MAMBA)
def test_gradients_of_the_real_model(family):
    model, tokens = random_model(7, family, n_layers=2), random_tokens(7, length=6)
    past = model(random_tokens(8), return_state=True)[1].detach()
    run = {"initial_state": past}
    found = attribute(FrozenModel(model, tokens, selection="gradient", **run), targets=Logit(3))

    def at(x, scale, *place):
        x = x.clone()
        x[(slice(None), *place)] *= scale
        return x

    for t in range(6):
        slope = difference(model, tokens, "hook_embed", lambda x, scale, t=t: at(x, scale, t), **run)
        assert abs(slope - float(found.embeddings[0, t])) < 1e-6 * (1 + abs(slope))
    for layer, s, e in ((0, 2, 1), (0, 5, 3), (1, 4, 0)):
        place = (s, e) if family == "mamba" else (s, e // model.cfg.P, e % model.cfg.P)
        name = f"blocks.{layer}.mixer.hook_x"
        slope = difference(model, tokens, name, lambda x, scale, place=place: at(x, scale, *place), **run)
        assert abs(slope - float(found.heads[layer][0, s, e])) < 1e-6 * (1 + abs(slope))
    step = 1e-5

    def logit_from(scale):
        other = ModelState(tuple(layer.map(lambda part: part * scale) for layer in past))
        with torch.no_grad():
            return float(model(tokens, initial_state=other)[0, -1, 3])

    slope = (logit_from(1 + step) - logit_from(1 - step)) / (2 * step)
    assert abs(slope - float(sum(found.initial.values()))) < 1e-6 * (1 + abs(slope))


def test_a_head_that_is_a_node_passes_nothing_on():
    model, tokens = random_model(3, "mamba", n_layers=2), random_tokens(3, length=6)
    frozen = FrozenModel(model, tokens, selection="half")
    whole = attribute(frozen, targets=Logit(3))
    node = torch.zeros(6, model.cfg.E, dtype=torch.float64)
    node[2, 1] = 1
    cut = attribute(frozen, targets=Logit(3), nodes={1: node})
    assert torch.allclose(cut.node_heads[1][:, 0], whole.heads[1][:, 2, 1])
    assert cut.residual.abs().max() < 1e-10
    assert not torch.allclose(cut.embeddings, whole.embeddings)


def test_graphs_with_edges_of_selection():
    """Rows of a graph sum by every rule; with gradients what a straight line misses is in the remainder."""
    model, tokens = random_model(5, "mamba", n_layers=2), random_tokens(5, length=6)
    for selection in ("half", "shares", "gradient"):
        frozen = FrozenModel(model, tokens, selection=selection)
        graph = build_graph(frozen, Logit(3), max_heads=5)
        assert graph.residual().abs().max() < 1e-10
        assert graph.about["selection"] == selection
    value = build_graph(FrozenModel(model, tokens), Logit(3), max_heads=5)
    assert (value.about["selection"], value.about["shares"]) == ("none", None)
    uneven = build_graph(FrozenModel(model, tokens, selection=(0.5, 0.2, 0.3)), Logit(3), max_heads=5)
    assert (uneven.about["selection"], uneven.about["shares"]) == ("shares", [0.5, 0.2, 0.3])


def test_what_is_refused(unchecked):
    model, tokens = random_model(1, "mamba"), random_tokens(1, length=4)
    with pytest.raises(ValueError, match="selection must be one of none, half"):
        FrozenModel(model, tokens, selection="lrp")
    with pytest.raises(ValueError, match="got 'gradients'; nearest: 'gradient'"):
        FrozenModel(model, tokens, selection="gradients")
    with pytest.raises(ValueError, match="or three shares; got None"):
        FrozenModel(model, tokens, selection=None)
    for shares in ((1.0, 1.0, 1.0), (0.5, 0.5), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ValueError, match="that sum to 1"):
            FrozenModel(model, tokens, selection=shares)
    coder = SparseCoder(mambacoder_config(0, model.cfg.d_model, 12, architecture="topk", k=2, target="local"), seed=0)
    with pytest.raises(ValueError, match="has no split layers, and layer 0 is one"):
        FrozenModel(model, tokens, [coder.double()], selection="half")
    with pytest.raises(ValueError, match="takes a run with selection 'none'"):
        patch_effects(FrozenModel(model, tokens, selection="half"), target=3, replace_by=1)


@pytest.mark.parametrize("reads", ["normalized", "resid"])
def test_a_skip_is_differentiated_with_its_norm(reads):
    """Features and errors are where paths end, so that below them the skip alone is left."""
    model, tokens = random_model(4, "mamba", n_layers=1), random_tokens(4, batch=2, length=5)
    coder = coders_for(model, skip=True, reads=reads)[0]
    frozen = FrozenModel(model, tokens, [coder], selection="gradient")
    found = attribute(frozen, targets=Logit(3))
    embed = frozen.resid(0).requires_grad_()
    read = embed if reads == "resid" else model.blocks[0].norm(embed)
    out = embed + (frozen.out(0) - (read @ coder.W_skip).detach()) + read @ coder.W_skip
    logits = model.unembed(model.ln_final(out))
    assert torch.allclose(logits, frozen.logits)
    (gradient,) = torch.autograd.grad(logits[:, -1, 3].sum(), embed)
    assert torch.allclose(found.embeddings, (gradient * embed).sum(-1))
