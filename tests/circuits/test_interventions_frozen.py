"""Edits of the frozen model: against replays in numpy, the edges of graphs, and attributions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from circuits import Channel, Direction, Feature, FrozenModel, Logit, attribute, build_graph
from circuits.interventions import (
    CutHead,
    CutTokens,
    ScaleEmbedding,
    ScaleError,
    ScaleFeature,
    ScaleState,
    SetFeature,
    SetState,
    edit_of,
    frozen_effects,
)
from hooked_mamba.config import Mamba2Config
from saes import SparseCoder, sae_config
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import Off, Replay, array
from tests.circuits.test_attribution import coders_for
from tests.kinds import MAMBA

FAMILIES = MAMBA


def vector_of(model, seed=0):
    return torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Edited(Replay):
    """A replay with embeddings scaled, sums of layers cut pair by pair, and states edited, one position at a time.

    `cuts`: (layer, source kind, sources, targets, channels). `states`: (layer, position, channel) -> (factor, value).
    """

    def __init__(self, model, cache, row, embeddings=None, cuts=(), states=None):
        super().__init__(model, cache, row)
        shares = np.array([(embeddings or {}).get(t, 1.0) for t in range(len(self.embed))])
        self.embed = self.embed * shares[:, None]
        self.cuts, self.states = cuts, states or {}
        self.scans = [self._scan(model, cache, i, row) for i in range(model.cfg.n_layers)]

    def _scan(self, model, cache, i, row):
        """A_bar, B_bar, C of each channel (l E N), and D."""
        cfg, mixer = model.cfg, model.blocks[i].mixer
        dt, B, C = (array(cache[f"blocks.{i}.mixer.hook_{name}"][row]) for name in ("dt", "B", "C"))
        A, D = -np.exp(array(mixer.A_log)), array(mixer.D)
        if isinstance(cfg, Mamba2Config):
            heads, per_group = np.repeat(np.arange(cfg.H), cfg.P), cfg.H // cfg.G
            dt, D, A = dt[:, heads], D[heads], A[heads][:, None]
            B, C = B[:, heads // per_group], C[:, heads // per_group]
        else:
            B, C = (np.repeat(v[:, None], cfg.E, 1) for v in (B, C))
        return np.exp(dt[..., None] * A), dt[..., None] * B, C, D

    def out(self, i, x, off):
        layer, (A_bar, B_bar, C, D) = self.layers[i], self.scans[i]
        p = x * layer.norm_factor @ layer.W_x.T + layer.b_x
        (l, E), K = p.shape, layer.kappa.shape[1]
        y = np.zeros((l, E))
        for t in range(l):
            cuts = [cut for cut in self.cuts if cut[0] == i and t in cut[3]]
            by_scan, by_token = np.ones((l, E)), np.ones((l, E))
            for _, kind, sources, _, channels in cuts:
                (by_scan if kind == "scan" else by_token)[np.ix_(sources, channels)] = 0
            h = np.zeros(C.shape[1:])
            for s in range(t + 1):
                tokens = range(max(0, s - K + 1), s + 1)
                xc = sum(layer.kappa[:, K - 1 - s + j] * p[j] * by_token[j] for j in tokens) + layer.b_c
                u = layer.sigma[s] * xc * by_scan[s]
                h = A_bar[s] * h + B_bar[s] * u[:, None]
                for e in range(E):
                    factor, value = self.states.get((i, s, e), (1.0, 0.0))
                    h[e] = factor * h[e] + value
            y[t] = (C[t] * h).sum(1) + D * u
        return (y * layer.gain) @ layer.W_o.T + layer.b_o


EMBEDDED, HEADS, TOKENS = ScaleEmbedding([1, 3], 0.5), CutHead(0, [1, 2], [0, 3], slice(2, 5)), CutTokens(2, [3, 5], 1)
SETS = {
    "embeddings": [EMBEDDED],
    "heads": [HEADS],
    "heads, all targets": [CutHead(1, 2, 1)],
    "heads of tokens": [CutHead(1, [0, 3], [2], source="token"), CutHead(1, 2, [2, 3], [4, 5])],
    "tokens": [TOKENS, CutTokens([1, 2], slice(3, None))],
    "states": [ScaleState(0, 2, 0.5, [0, 3]), SetState(1, [1, 3], 0.7), ScaleState(1, -3, -1.0)],
    "everything": [EMBEDDED, HEADS, TOKENS, ScaleState(0, 3, 0.5), SetState(1, 4, 0.3, [1]), CutHead(1, 3)],
}


def oracle_of(model, cache, row, edits):
    """The same edits in the oracle's words."""
    l, everyone = 6, list(range(model.cfg.E))

    def places(positions):
        if positions is None or isinstance(positions, slice):
            return list(range(l))[positions or slice(None)]
        return [t % l for t in ([positions] if isinstance(positions, int) else positions)]

    embeddings, cuts, states = {}, [], {}
    for edit in edits:
        if isinstance(edit, ScaleEmbedding):
            embeddings |= dict.fromkeys(places(edit.positions), edit.factor)
        elif isinstance(edit, CutHead):
            channels = [edit.channels] if isinstance(edit.channels, int) else edit.channels or everyone
            cuts.append((edit.layer, edit.source, places(edit.sources), places(edit.targets), channels))
        elif isinstance(edit, CutTokens):
            layers = range(model.cfg.n_layers) if edit.layers is None else [edit.layers]
            cuts += [(i, edit.source, places(edit.sources), places(edit.targets), everyone) for i in layers]
        else:
            keep, value = (edit.factor, 0.0) if isinstance(edit, ScaleState) else (0.0, edit.value)
            for t, e in itertools.product(places(edit.positions), edit.channels or everyone):
                before = states.get((edit.layer, t, e), (1.0, 0.0))
                states[edit.layer, t, e] = keep * before[0], keep * before[1] + value
    return Edited(model, cache, row, embeddings, cuts, states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETS)
def test_effects_are_differences_of_replays(family, name):
    model, tokens = random_model(5, family, n_layers=2), random_tokens(5, 2, 6)
    vector = vector_of(model)
    targets = [Logit(3), Direction(vector, 2, 4), Direction(vector, 1, 3, "out")]
    found = frozen_effects(FrozenModel(model, tokens), SETS[name], targets)
    assert found.shape == (3, 2)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for row in range(2):
        replays = Replay(model, cache, row), oracle_of(model, cache, row, SETS[name])
        below = [replay.resid(upto=1) for replay in replays]
        outs = [replay.out(1, x, Off()) for replay, x in zip(replays, below, strict=True)]
        out = outs[1] - outs[0]
        resid = below[1] - below[0] + out
        expected = [
            (resid[-1] * replays[0].final[-1]) @ replays[0].W_U[3],
            resid[4] @ vector.numpy(),
            out[3] @ vector.numpy(),
        ]
        assert np.allclose(found[:, row].numpy(), expected, atol=1e-10)
    assert found.abs().max() > 1e-4


@pytest.mark.parametrize("target", [None, "block", "local"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablating_a_node_is_minus_its_edges(family, target):
    model = random_model(4, family, n_layers=3)
    coders = [] if target is None else coders_for(model, target, skip=True)[1:]  # layer 0 stays a mixer
    frozen = FrozenModel(model, random_tokens(4, 1, 5), coders)
    vector = vector_of(model)
    targets = [Logit(3), Logit(5, 3, minus=2), Direction(vector, 2, 4)]
    graph = build_graph(frozen, targets, max_features=8, max_heads=8)
    inner = [
        Channel(node.layer, node.index, node.position)
        if node.kind == "head"
        else Feature(frozen.coded[node.layer].coder, node.index, node.position)
        for node in graph.nodes
        if node.kind in ("head", "feature")
    ]
    rows = graph.where("target", "head", "feature")
    edited = 0
    for j, node in enumerate(graph.nodes):
        if node.kind in ("embed", "error", "feature", "head"):
            effect = frozen_effects(frozen, edit_of(frozen, node), [*targets, *inner], hold=graph)[:, 0]
            assert torch.allclose(effect, -graph.weights[rows, j], atol=1e-10), node.label
            edited += 1
        else:
            with pytest.raises(ValueError, match="cannot be edited"):
                edit_of(frozen, node)
    assert edited > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_effects_are_attributions(family):
    model, tokens = random_model(6, family, n_layers=2), random_tokens(6, 2, 5)
    frozen = FrozenModel(model, tokens)
    found = attribute(frozen, targets=Logit(3))
    for s, e in ((0, 1), (3, 2)):
        assert torch.allclose(frozen_effects(frozen, CutHead(0, s, e), Logit(3))[0], -found.heads[0][:, s, e])
        cut = CutHead(0, s, e, source="token")
        assert torch.allclose(frozen_effects(frozen, cut, Logit(3))[0], -found.token_heads[0][:, s, e])
    assert torch.allclose(frozen_effects(frozen, ScaleEmbedding(2), Logit(3))[0], -found.embeddings[:, 2])
    nothing = [CutHead(0, []), ScaleEmbedding(None, 1.0), ScaleState(1, 2, 1.0), CutTokens(1, [])]
    assert not frozen_effects(frozen, nothing, Logit(3)).any()


@pytest.mark.parametrize("target", ["block", "local"])
def test_latents_and_errors(target):
    model, tokens = random_model(6, "mamba", n_layers=2), random_tokens(6, 2, 5)
    coders = coders_for(model, target, skip=True)
    frozen = FrozenModel(model, tokens, coders)
    found = attribute(frozen, targets=[Logit(3), Direction(vector_of(model), 1, 4, "out")])
    index = int(frozen.coded[0].codes.indices[0, 3, 0])
    active = (found.codes[0].indices[:, 3] == index).to(found.target.dtype) * found.features[0][:2, 3]
    doubled = frozen_effects(frozen, ScaleFeature(coders[0], index, 3, 2.0), Logit(3))[0]
    assert torch.allclose(doubled, active.sum(-1))
    zero = frozen_effects(frozen, SetFeature(coders[0], index, 0.0, 3), Logit(3))[0]
    assert torch.allclose(zero, -active.sum(-1))
    both = frozen_effects(frozen, [ScaleError(coders[1], 2), ScaleError(coders[1], [2, 4], 3.0)], Logit(3))[0]
    assert torch.allclose(both, -found.errors[1][:2, 2] + 2 * found.errors[1][:2, 4])
    own = frozen_effects(frozen, SetFeature(coders[1], 5, 2.0, 4), Direction(vector_of(model), 1, 4, "out"))[0]
    change = 2.0 - frozen.latents(1)[:, 4, 5]
    assert torch.allclose(own, change * (coders[1].W_dec[5] @ vector_of(model)))
    sae = SparseCoder(sae_config("blocks.1.hook_resid_pre", model.cfg.d_model, 7, k=3), seed=1).double()
    plain = FrozenModel(model, tokens)
    moved = frozen_effects(plain, SetFeature(sae, 2, 1.5, 1), Direction(vector_of(model), 1, 1))[0]
    z = sae.encode(plain.resid(1))[:, 1, 2]
    assert torch.allclose(moved, (1.5 - z) * (sae.W_dec[2] @ vector_of(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_layer_passes_what_is_not_cut(family):
    """With all flow of layer 1 cut, what changes below reaches the top only past the layer."""
    model, tokens = random_model(6, family, n_layers=2), random_tokens(6, 2, 5)
    frozen = FrozenModel(model, tokens, coders_for(model, "local")[1:])
    top, below = (Direction(vector_of(model), layer, 4) for layer in (2, 1))
    changed = [ScaleEmbedding(1), ScaleEmbedding(4, 0.5)]
    passed, past = frozen_effects(frozen, changed, [top, below])
    assert (passed - past).abs().min() > 1e-6
    for cut in (CutTokens(None, None, 1), CutHead(1, None)):
        alone = frozen_effects(frozen, cut, top)[0]
        assert torch.allclose(frozen_effects(frozen, [cut, *changed], top)[0], alone + past, atol=1e-12)
    ahead = CutTokens(slice(0, 4), 4, 1)
    by_token = [CutTokens(s, 4, 1) for s in range(4)]
    together = frozen_effects(frozen, [ahead, *changed], top)
    assert torch.allclose(frozen_effects(frozen, [*by_token, *changed], top), together, atol=1e-12)


def test_padding_and_memory():
    model, tokens = random_model(5, "mamba2", n_layers=2), random_tokens(5, 1, 7)
    edits = [CutHead(1, 3, [0, 1], source="token"), ScaleState(0, 4, 0.5), ScaleEmbedding(2), CutTokens(3, [5, 6])]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    padded = frozen_effects(FrozenModel(model, tokens, attention_mask=mask), edits, Logit(3))

    def earlier(edit):
        if isinstance(edit, CutTokens):
            return CutTokens(1, [3, 4])
        return {CutHead: CutHead(1, 1, [0, 1], source="token"), ScaleState: ScaleState(0, 2, 0.5),
                ScaleEmbedding: ScaleEmbedding(0)}[type(edit)]  # fmt: skip

    alone = frozen_effects(FrozenModel(model, tokens[:, 2:]), [earlier(edit) for edit in edits], Logit(3))
    assert torch.allclose(padded, alone)
    with torch.no_grad():
        _, state = model(tokens[:, :3], return_state=True)
    late = FrozenModel(model, tokens[:, 3:], initial_state=state)
    found = attribute(late, targets=Logit(3))
    cleared = frozen_effects(late, SetState(1, 0, 0.0), Logit(3))
    assert cleared.abs().max() > 1e-6
    heads = frozen_effects(late, CutHead(1, None), Logit(3))[0]
    assert torch.allclose(heads, -found.heads[1].sum((1, 2)))


def test_what_is_refused():
    model = random_model(5, "mamba", n_layers=2)
    coders = coders_for(model, "local")
    frozen = FrozenModel(model, random_tokens(5, 1, 5), coders)
    with pytest.raises(ValueError, match="a split one, cannot be edited"):
        frozen_effects(frozen, ScaleState(1, 2), Logit(3))
    norm = SparseCoder(sae_config("blocks.1.norm.hook_out", model.cfg.d_model, 7, k=3), seed=1).double()
    with pytest.raises(ValueError, match="has no place in the frozen model"):
        frozen_effects(frozen, ScaleFeature(norm, 1), Logit(3))
    with pytest.raises(IndexError, match="position 9"):
        frozen_effects(FrozenModel(model, random_tokens(5, 1, 5)), ScaleState(1, 9), Logit(3))
    with pytest.raises(IndexError, match="position 9"):
        frozen_effects(frozen, CutHead(1, 9), Logit(3))
    with pytest.raises(ValueError, match="no target: give a Logit"):
        frozen_effects(frozen, CutHead(1, 2), [])
    half = FrozenModel(model, random_tokens(5, 1, 5), selection="half")
    with pytest.raises(ValueError, match="selection='half'"):
        frozen_effects(half, CutHead(1, 1), Logit(3))
    graph = build_graph(FrozenModel(model, random_tokens(5, 1, 5), coders_for(model, "block")), Logit(3))
    node = next(node for node in graph.nodes if node.kind == "error")
    with pytest.raises(KeyError, match="has no coder here"):
        edit_of(FrozenModel(model, random_tokens(5, 1, 5)), node)
