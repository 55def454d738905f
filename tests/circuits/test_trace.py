"""Paths step by step: the exact ones against `attribute`, the published ones against their formulas in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import Channel, Feature, FrozenModel, Logit, PathOptions, attribute, trace_paths
from circuits.published import optioned
from saes import SparseCoder, mambacoder_config
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import Replay, array
from tests.circuits.test_attribution import coders_for
from tests.kinds import MAMBA

PRESET = PathOptions.of("mambacoder")
HEADS = ("conv", "ssm_input", "include_self", "include_D", "norm_at")
"""The choices that a model without coders is traced by."""


WAYS = ("plain", "padded", "going on", "block", "split", "mixed")
"""A model read alone, padded, going on, by features, by features and heads of tokens, by both in one of its layers."""


def read_in_a_way(name, seed, family):
    model, tokens = random_model(seed, family, n_layers=2), random_tokens(seed, batch=2, length=4)
    if name == "going on":
        with torch.no_grad():
            _, state = model(tokens[:, :1], return_state=True)
        return FrozenModel(model, tokens[:, 1:], initial_state=state)
    coders = {"block": {"skip": True}, "split": {"target": "local"}, "mixed": {"target": "local"}}
    coders = coders_for(model, **coders[name])[: 1 if name == "mixed" else None] if name in coders else []
    mask = torch.tensor([[1] * 4, [0, 1, 1, 1]]) if name in ("padded", "block", "split") else None
    return FrozenModel(model, tokens, coders, attention_mask=mask)


def of_both_families(names):
    """By default each with one family, in turn."""
    return pytest.mark.parametrize(
        ("name", "family"),
        [
            pytest.param(name, family, marks=[] if number % 2 == place else pytest.mark.slow)
            for number, name in enumerate(names)
            for place, family in enumerate(MAMBA)
        ],
    )


def weights_of(paths):
    """What lies behind the target on a path -> its weight."""
    return {tuple(node.key for node in path.nodes[1:]): path.weight for path in paths}


@of_both_families(WAYS)
def test_exact_paths_are_those_of_attribute(name, family):
    frozen, row = read_in_a_way(name, 5, family), 1
    ones = {i: torch.ones(frozen.length, frozen.model.cfg.E, dtype=torch.float64) for i in range(2)}
    target = Logit(3, minus=2)
    found = trace_paths(frozen, target, k=10**6, length=2, row=row)
    direct = attribute(frozen, targets=target, nodes=ones)
    for layer, heads in found.heads.items():
        assert torch.allclose(heads.flatten(), direct.node_heads[layer][row], atol=1e-10)
    first = {path.nodes[-1].key: path.weight for path in found.paths[0]}
    assert abs(sum(first.values()) - float(direct.target[row])) < 1e-10
    last = frozen.length - 1
    assert abs(first["embed", -1, last, 0] - float(direct.embeddings[row, last])) < 1e-10
    # Each node traced by itself, as a target, gives the second edges: its parts, as shares of its value.
    second = weights_of(found.paths[1])
    nodes = [path.nodes[-1] for path in found.paths[0] if path.nodes[-1].kind in ("head", "feature")]
    for node in nodes[:: max(1, len(nodes) // 5)]:
        inner = Channel(node.layer, node.index, node.position)
        if node.kind == "feature":
            inner = Feature(frozen.coded[node.layer].coder, node.index, node.position)
        parts = attribute(frozen, targets=inner, nodes=ones)
        share = first[node.key] / float(parts.target[row])
        for t in range(frozen.length):
            effect = second.get((node.key, ("embed", -1, t, 0)), 0.0)
            assert abs(effect - share * float(parts.embeddings[row, t])) < 1e-10
        total = sum(weight for keys, weight in second.items() if keys[0] == node.key)
        assert abs(total - first[node.key]) < 1e-10


@pytest.mark.parametrize("family", MAMBA)
def test_all_paths_to_their_ends_sum_to_the_target(family):
    frozen = FrozenModel(random_model(4, family, n_layers=2), random_tokens(4, length=3))
    found = trace_paths(frozen, Logit(3), k=10**6, length=3)
    ended = [path for paths in found.paths for path in paths if path.nodes[-1].kind not in ("head", "feature")]
    assert abs(sum(path.weight for path in ended) - found.value) < 1e-10
    assert not any(path.nodes[-1].kind in ("head", "feature") for path in found.paths[2])
    by_token = attribute(frozen, targets=Logit(3)).embeddings[0]
    for t in range(3):
        mine = [path.weight for path in ended if path.nodes[-1].kind == "embed" and path.nodes[-1].position == t]
        assert abs(sum(mine) - float(by_token[t])) < 1e-10


@of_both_families(WAYS)
def test_options_at_their_defaults_are_the_exact_method(name, family):
    frozen = read_in_a_way(name, 6, family)
    by_options = optioned(frozen, PathOptions())
    targets = [Logit(3), Logit(5, 2, minus=2), Channel(1, 2, 2)]
    for target in targets:
        one, other = (trace_paths(run, target, k=30, length=3, row=1) for run in (frozen, by_options))
        for layer, heads in one.heads.items():
            assert torch.allclose(heads, other.heads[layer], atol=1e-10)
        for mine, theirs in zip(one.paths, other.paths, strict=True):
            # Of equal ones any may come first, and rounding decides which of those that are nothing are listed.
            sizes = [[abs(path.weight) for path in paths if abs(path.weight) > 1e-12] for paths in (mine, theirs)]
            assert np.allclose(*sizes, rtol=0, atol=1e-10)
    one, other = (attribute(run, targets=targets) for run in (frozen, by_options))
    assert torch.allclose(one.embeddings, other.embeddings, atol=1e-10)
    for part in ("heads", "token_heads", "features", "biases", "initial"):
        for layer, values in getattr(one, part).items():
            assert torch.allclose(values, getattr(other, part)[layer], atol=1e-10)


class Loops:
    """One step of the published method and its options, from a covector at one token, in loops over cached numbers."""

    def __init__(self, model, tokens, options):
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        self.cache, self.options, self.replay = cache, options, Replay(model, cache, 0)
        self.D = [array(block.mixer.D) for block in model.blocks]
        if hasattr(model.cfg, "head_dim"):
            self.D = [np.repeat(D, model.cfg.head_dim) for D in self.D]
        self.scale = [array(cache[f"blocks.{i}.norm.hook_scale"][0, :, 0]) for i in range(model.cfg.n_layers)]
        self.pu = [self._inner(i) for i in range(model.cfg.n_layers)]

    def _inner(self, i):
        layer = self.replay.layers[i]
        x = self.replay.resid(upto=i)
        p = x * layer.norm_factor @ layer.W_x.T + layer.b_x
        K, u = layer.kappa.shape[1], np.zeros_like(p)
        for t in range(len(p)):
            total = layer.b_c.copy()
            for k in range(K):
                if t - k >= 0:
                    total += layer.kappa[:, K - 1 - k] * p[t - k]
            u[t] = layer.sigma[t] * total
        return p, u

    def heads(self, i, t, vector):
        """(sources, channels): what they add, and the covector on u that goes on."""
        layer, (_, u) = self.replay.layers[i], self.pu[i]
        vy = (layer.W_o.T @ vector) * layer.gain[t]
        effects, onward = np.zeros_like(u), np.zeros_like(u)
        for s in range(t + 1):
            alpha = layer.alpha[:, t, s].copy()
            if s == t:
                own = alpha - self.D[i]
                alpha = own * self.options.include_self + self.D[i] * self.options.include_D
            effects[s] = alpha * vy * u[t if self.options.ssm_input == "dest" else s]
            onward[s] = alpha * vy
        return effects, onward

    def tokens(self, i, s, onward, t):
        """What each embedding adds to a covector on layer i's u at s, by the residual stream alone."""
        layer, (p, u) = self.replay.layers[i], self.pu[i]
        K, found = layer.kappa.shape[1], np.zeros(len(p))
        scale = self.scale[i][s] / self.scale[i][t] if self.options.norm_at == "dest" else 1.0
        for k in range(K):
            if s - k >= 0:
                factor = layer.sigma[s] * layer.kappa[:, K - 1 - k]
                if self.options.conv == "ratio":
                    factor = u[s] / p[s] * (k == 0)
                below = (layer.W_x.T @ (onward * factor)) * layer.norm_factor[s - k]
                found[s - k] = float(below @ self.embedding(s - k) * scale)
        return found

    def embedding(self, t):
        norm = self.replay.layers[0].norm_factor[t] if self.options.input_norm == "layer_norm" else 1.0
        return self.replay.embed[t] * norm


@of_both_families([*HEADS, "all"])
def test_choices_about_heads_are_their_formulas(name, family):
    model, tokens = random_model(3, family, n_layers=2), random_tokens(3, length=5)
    choices = {each: getattr(PRESET, each) for each in (HEADS if name == "all" else [name])}
    options, t = PathOptions(**choices), 3
    frozen, loops = FrozenModel(model, tokens), Loops(model, tokens, options)
    found = trace_paths(frozen, Logit(3, t), k=10**6, length=2, preset=options)
    exact = trace_paths(frozen, Logit(3, t), k=10**6, length=2)
    vector = loops.replay.final[t] * loops.replay.W_U[3]
    second = weights_of(found.paths[1])
    for i in range(2):
        effects, onward = loops.heads(i, t, vector)
        assert np.abs(array(found.heads[i]) - effects).max() < 1e-10
        for s, e in ((1, 0), (2, 2), (3, 1)):
            by_token = loops.tokens(i, s, onward[s] * np.eye(len(onward[s]))[e], t)
            for q in range(5):
                weight = second.get((("head", i, s, e), ("embed", -1, q, 0)), 0.0)
                assert abs(weight - by_token[q]) < 1e-10
    differ = weights_of(exact.paths[1])
    assert max(abs(differ.get(keys, 0.0) - weight) for keys, weight in second.items()) > 1e-6


def test_the_preset_is_the_published_method():
    """Feature -> heads, features and embedding at the token; sums over channels under the label of the largest."""
    model, tokens = random_model(11, "mamba", n_layers=3), random_tokens(11, length=6)
    d, t, row = model.cfg.d_model, 4, 0
    coders = [SparseCoder(mambacoder_config(i, d, 9, k=3), seed=i).double() for i in range(3)]
    frozen, loops = FrozenModel(model, tokens, coders), Loops(model, tokens, PRESET)
    found = trace_paths(frozen, Feature(coders[2], 5, t), k=10**6, length=2, preset="mambacoder")
    f = array(coders[2].W_enc[:, 5])
    expected, below = {}, {}

    def step(top, t, vector):
        for i in range(top):
            effects, onward = loops.heads(i, t, vector)
            for s in range(t):
                yield ("head", i, s, int(effects[s].argmax())), effects[s].sum(), (i, s, onward[s])
            n = array(loops.cache[f"blocks.{i}.norm.hook_out"][row, t])
            for j in range(9):
                preact = n @ array(coders[i].W_enc[:, j]) + float(coders[i].b_enc[j].detach())
                reach = float(array(coders[i].W_dec[j]) @ vector)
                yield ("feature", i, t, j), preact * reach, (i, t, reach * array(coders[i].W_enc[:, j]))
        yield ("embed", -1, t, 0), float(vector @ loops.embedding(t)), None

    for key, effect, onward in step(2, t, f):
        expected[key], below[key] = effect, onward
    listed = {path.nodes[-1].key: path.weight for path in found.paths[0]}
    assert {key for key, effect in listed.items() if abs(effect) > 1e-12} == set(expected)
    assert max(abs(listed[key] - expected[key]) for key in expected) < 1e-10
    assert list(listed.values()) == sorted(listed.values(), reverse=True)  # signed: what takes away comes last
    second = weights_of(found.paths[1])
    for key, onward in below.items():
        if key[0] == "head":
            by_token = loops.tokens(key[1], key[2], onward[2], t)
            assert abs(second[key, ("embed", -1, key[2], 0)] - by_token[key[2]]) < 1e-10
        elif key[0] == "feature" and key[1] == 1:
            for inner, effect, _ in step(1, t, onward[2]):
                assert abs(second.get((key, inner), 0.0) - effect) < 1e-10
    best = found.paths[0].paths[0]
    assert str(best) == f"block2[5]@4 -> {best.nodes[-1].label}: {best.weight:.2g}"
    assert found.paths[0].remainder == pytest.approx(found.value - sum(listed.values()))


def test_what_is_refused(unchecked):
    model, tokens = random_model(1, "mamba"), random_tokens(1, length=4)
    frozen = FrozenModel(model, tokens)
    with pytest.raises(ValueError, match="nearest: 'mambacoder'"):
        trace_paths(frozen, Logit(3), preset="mambacode")
    with pytest.raises(ValueError, match="conv must be 'taps' or 'ratio', got 'exact'"):
        PathOptions(conv="exact")
    with pytest.raises(ValueError, match="k must be at least 1"):
        trace_paths(frozen, Logit(3), k=0)
    with pytest.raises(IndexError, match="row 1 is out of range"):
        trace_paths(frozen, Logit(3), row=1)
    with pytest.raises(ValueError, match="selection 'half' has no preset"):
        trace_paths(FrozenModel(model, tokens, selection="half"), Logit(3), preset="mambacoder")


@pytest.mark.parametrize("name", ["block", "split"])
def test_beside_features_stand_the_heads_of_the_whole_mixer(name):
    coded = read_in_a_way(name, 5, "mamba")
    alone = FrozenModel(coded.model, coded.tokens, attention_mask=coded.mask.long())
    one, other = (trace_paths(frozen, Logit(3), k=400, row=1, preset="mambacoder") for frozen in (coded, alone))
    assert sorted(one.heads) == sorted(other.heads) == [0, 1]
    for layer, heads in one.heads.items():
        assert torch.allclose(heads, other.heads[layer], atol=1e-10)
    kinds = [{path.nodes[-1].kind for path in found.paths[0]} for found in (one, other)]
    assert kinds == [{"head", "feature", "embed"}, {"head", "embed"}]
