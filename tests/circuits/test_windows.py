"""Transcoders to what a token writes into memory, from the window of inputs that a convolution sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits import Direction, Feature, FrozenModel, Logit, attribute, build_graph, load_graph, save_graph, trace_paths
from circuits.faithfulness import faithfulness
from circuits.integrated import node_effects
from circuits.interventions import ScaleFeature, edit_of, frozen_effects, intervened
from circuits.keep import Keep, only
from circuits.patch_effects import patch_effects
from circuits.points import reach, stays
from circuits.push import frozen_changes
from hooked_mamba.frozen.places import branch_of
from saes import SparseCoder, mambacoder_config
from saes.rewriting import Rewrite, rewritten
from saes.targets import taps_of
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import Off
from tests.circuits.test_writes import built, each_kind, each_kind_begun
from tests.circuits.writes import EXACT, Written, begun, check_against_whole, noisy, window_writer, writable
from tests.kinds import MAMBA


def windowed(model: Any, skip: bool = False) -> list[SparseCoder]:
    """One for every branch, two positions wide at least."""
    found = []
    for i, part in enumerate(writable(model)):
        layer, name = branch_of(part)
        block = model.block(layer)
        own = name in block.stages[0] and not block.beside  # only its own norm's values may be skipped to
        taps = taps_of(model, f"blocks.{layer}.{name}.x")
        found.append(window_writer(model, part, max(2, taps), seed=i, skip=skip and own))
    return found


def side_by_side(n: Tensor, window: int, first: int = 0) -> Tensor:
    """What a coder reads of one row, l d, in a plain loop."""
    rows = [torch.cat([n[s] if s >= first else 0 * n[0] for s in range(t - window + 1, t + 1)]) for t in range(len(n))]
    return torch.stack(rows)


@each_kind
def test_every_kind_of_branch(kind):
    """Rows sum, edges are what removal changes, and with everything kept the real model is as it was."""
    model, tokens = built(kind)
    coders = windowed(model, skip=True)
    frozen = FrozenModel(model, tokens, coders)
    for part in writable(model):
        layer, name = branch_of(part)
        assert model.block(layer).branches[name].reach == reach(frozen.chain(part).between(until="u")), part
    assert {coded.mode for coded in frozen.coded.values()} == {"write"}
    targets = [Logit(3), Feature(coders[-1], 2), Feature(coders[len(coders) // 2], 1, 3), Logit(5, 3)]
    assert attribute(frozen, targets=targets).residual.abs().max() < EXACT
    graph = build_graph(frozen, targets, max_features=14)
    assert float(graph.residual().abs().max()) < EXACT
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "error", "feature")]
    assert torch.allclose(frozen_changes(frozen, graph, targets, ends), -graph.weights[:, ends].t(), atol=EXACT)
    for i in [i for i in ends if graph.nodes[i].kind in ("error", "feature")][::5]:
        effect = frozen_effects(frozen, edit_of(frozen, graph.nodes[i]), targets, hold=graph)[:, 0]
        assert torch.allclose(effect, -graph.weights[: len(targets), i], atol=EXACT)
    with torch.no_grad(), only(frozen, Keep.everything(frozen)):
        assert torch.allclose(model(tokens), frozen.logits, atol=1e-9)


@each_kind
def test_encoder_rows_go_back_to_the_stream_as_differences_say(kind):
    """The stream entering a block is changed in the real model at one position, the norm's divisor held."""
    model, tokens = built(kind)
    tokens = torch.cat([tokens, tokens.flip(1)])
    for coder in windowed(model):
        site, row = coder.cfg.in_site, 1
        frozen = FrozenModel(model, tokens, coder)
        place, scale = frozen.place_of(site), site.replace("hook_out", "hook_scale")
        if place.stream not in ("resid", "in") or model.block(int(coder.cfg.layer)).beside:
            continue
        layer = int(coder.cfg.layer)
        stream = f"blocks.{layer}." + ("hook_resid_pre" if place.stream == "resid" else "hook_resid_mid")
        names = [site, stream, *([scale] if place.normed else [])]
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=names)

        def preact(change: Tensor, t: int) -> float:
            held = [(scale, lambda value, hook: cache[scale])] if place.normed else []  # noqa: B023
            hooks = [(stream, lambda value, hook: value + change), *held]  # noqa: B023
            with torch.no_grad(), model.hooks(hooks):
                _, seen = model.run_with_cache(tokens, names_filter=[site])  # noqa: B023
            x = side_by_side(seen[site][row], coder.cfg.window)[t]  # noqa: B023
            return float((x @ coder.W_enc[:, 2] + coder.b_enc[2]).detach())  # noqa: B023

        for t in (0, 3):
            covector = Feature(coder, 2, t).covector(frozen, row)
            none = torch.zeros_like(cache[stream])
            clean = preact(none, t)
            assert abs(clean - float(covector.value)) < EXACT
            assert covector.columns == slice(max(0, t + 1 - coder.cfg.window), t + 1)
            for s in {0, max(0, t - 1), t, t + 1}:
                change = none.clone()
                change[row, s] = torch.randn(change.shape[-1], dtype=torch.float64)
                expected = preact(change, t) - clean
                assert abs(float(covector.of(change[row])) - expected) < 1e-9, (s, t)


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("coded", [{0, 1, 2}, {1}, {0, 2}])
def test_places_are_those_of_finite_differences(family, coded):
    """Embeddings, errors and features switched off in a replay in loops that imports nothing of the package."""
    model, tokens = random_model(5, family, n_layers=3), random_tokens(5, batch=2, length=6)
    coders = {i: window_writer(model, i, seed=i, window=3) for i in coded}
    frozen, row, t = FrozenModel(model, tokens, list(coders.values())), 1, 4
    at = max(coded)
    top = coders[at]
    found = attribute(frozen, targets=[Logit(3), Feature(top, 2, t), Feature(top, 2, 1)])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    enc, bias = top.W_enc[:, 2].detach().numpy().reshape(3, -1), top.b_enc[2].item()

    def numbers(off: Off = Off(), gone: tuple[int, int, np.ndarray] | None = None) -> np.ndarray:  # noqa: B008
        replay = Written(model, cache, row, coded)
        if gone is not None:
            replay.gone[gone[0]][gone[1]] += gone[2]
        n = replay.resid(off, upto=at) * replay.layers[at].norm_factor
        reads = [sum(enc[2 - k] @ n[q - k] for k in range(3) if q - k >= 0) + bias for q in (t, 1)]
        return np.array([replay.logit(3, -1, off), *reads])

    whole, mine = numbers(), [row, 2 + row, 4 + row]
    assert np.allclose(whole, found.target[mine].numpy(), atol=1e-9)
    for s in range(6):
        effect = whole - numbers(Off(embeddings={s}))
        assert np.allclose(effect, found.embeddings[mine, s].numpy(), atol=1e-9)
    for i in coded:
        here = frozen.coded[i]
        n = torch.tensor(Written(model, cache, row, coded).resid(upto=i))
        n = n * torch.tensor(Written(model, cache, row, coded).layers[i].norm_factor)
        expected = coders[i].encode(side_by_side(n, 3))
        assert torch.allclose(frozen.latents(i)[row], expected, atol=1e-9)
        for s in range(6):
            effect = whole - numbers(gone=(i, s, here.error[row, s].numpy()))
            assert np.allclose(effect, found.errors[i][mine, s].numpy(), atol=1e-9)
            for j, index in enumerate(here.codes.indices[row, s].tolist()):
                added = float(here.codes.values[row, s, j]) * here.W_dec[index].numpy()
                effect = whole - numbers(gone=(i, s, added))
                assert np.allclose(effect, found.features[i][mine, s, j].numpy(), atol=1e-9)
    assert float(found.embeddings[2 + row, t - 2 : t].abs().max()) > 1e-5, "nothing is read of earlier positions"


@each_kind_begun("padded", "going on")
def test_covectors_at_few_positions_find_what_whole_ones_do(monkeypatch, kind, start):
    model, one = built(kind)
    tokens = torch.cat([one, one.flip(1)])
    moving = [part for part in writable(model) if FrozenModel(model, tokens).chain(part).mix is not None]
    coders = [window_writer(model, part, 4, seed=i) for i, part in enumerate(moving)]
    frozen = FrozenModel(model, tokens, coders, **begun(model, tokens, start))
    targets = [Logit(3), Logit(5, 3), *(Feature(coder, 2, t) for coder in coders for t in (2, 4))]
    covectors = [target.covector(frozen, row) for target in targets for row in range(2)]
    assert stays(frozen, covectors) == (kind != "rwkv7")
    if start == "padded":  # the row alone, without its padding
        alone = FrozenModel(model, tokens[1:, 2:], coders)
        for target in targets[2:]:
            there = Feature(target.coder, 2, target.position - 2)
            value = there.covector(alone, 0).value
            assert torch.allclose(target.covector(frozen, 1).value, value, atol=EXACT)
    check_against_whole(monkeypatch, frozen, targets, start)


@pytest.mark.parametrize("family", MAMBA)
def test_padded_rows_and_skips_are_those_of_rows_alone(family):
    model, tokens = random_model(4, family, n_layers=3), random_tokens(4, 2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    coders = [window_writer(model, i, 3, seed=i, skip=True, reads=("normalized", "resid")[i % 2]) for i in range(3)]
    vector = torch.ones(model.cfg.d_model, dtype=torch.float64)
    targets = [Logit(3), Direction(vector, 2, -1, "out"), Feature(coders[2], 2, -2)]
    padded = attribute(FrozenModel(model, tokens, coders, attention_mask=mask), targets=targets)
    alone = attribute(FrozenModel(model, tokens[:1, 2:], coders), targets=targets)
    assert padded.residual.abs().max() < EXACT
    assert torch.allclose(padded.embeddings[::2, 2:], alone.embeddings, atol=EXACT)
    for i in range(3):
        assert torch.allclose(padded.errors[i][::2, 2:], alone.errors[i], atol=EXACT)
        assert torch.allclose(padded.features[i][::2, 2:].sum(-1), alone.features[i].sum(-1), atol=EXACT)


@pytest.mark.parametrize("skip", [False, True])
def test_a_window_before_a_whole_block(skip):
    """MambaCoders of all blocks that read three positions: errors and features stand at the output."""
    model, tokens = random_model(7, "mamba2", n_layers=3), random_tokens(7, 2, 6)
    d, coders = model.cfg.d_model, []
    for i in range(3):
        cfg = mambacoder_config(i, d, 11, architecture="topk", k=3, skip=skip, window=3)
        coders.append(noisy(SparseCoder(cfg, seed=i), i))
    frozen = FrozenModel(model, tokens[:1], coders)
    targets = [Logit(3), Feature(coders[2], 2, 4), Feature(coders[1], 1, 1)]
    assert stays(frozen, [target.covector(frozen, 0) for target in targets]) != skip
    assert attribute(frozen, targets=targets).residual.abs().max() < EXACT
    graph = build_graph(frozen, targets, max_features=9)
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "error", "feature")]
    assert torch.allclose(frozen_changes(frozen, graph, targets, ends), -graph.weights[:, ends].t(), atol=EXACT)


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("selection", ["half", "shares"])
def test_other_rules_sum(family, selection):
    model, tokens = random_model(3, family, n_layers=3), random_tokens(3, 2, 6)
    coders = [window_writer(model, 0, 3), window_writer(model, 2, 3, seed=1)]
    frozen = FrozenModel(model, tokens, coders, selection=selection)
    found = attribute(frozen, targets=[Logit(3), Feature(coders[1], 2, 4)])
    assert found.residual.abs().max() < EXACT


def test_gradients_are_those_of_the_model():
    model, tokens = random_model(3, "mamba", n_layers=2), random_tokens(3, 1, 6)
    coder = window_writer(model, 1, 3)
    found = attribute(FrozenModel(model, tokens, selection="gradient"), targets=Feature(coder, 2, 4))
    embed, kept = model.embed.weight.detach()[tokens].requires_grad_(), {}

    def keep(value: Tensor, hook: Any) -> None:
        kept["n"] = value

    with torch.enable_grad(), model.hooks([("hook_embed", lambda x, hook: embed), (coder.cfg.in_site, keep)]):
        model(tokens)
        preact = side_by_side(kept["n"][0], 3)[4] @ coder.W_enc[:, 2].detach()
        gradient = torch.autograd.grad(preact, embed)[0]
    assert torch.allclose(found.embeddings[0], (gradient * embed.detach())[0].sum(-1), atol=EXACT)


@pytest.mark.parametrize("family", MAMBA)
def test_checks_on_the_real_model(family, tmp_path):
    model, tokens = random_model(4, family, n_layers=2), random_tokens(4, 1, 5)
    coders = [window_writer(model, i, 3, "standard", seed=i) for i in range(2)]
    frozen = FrozenModel(model, tokens, coders)
    reference = FrozenModel(model, random_tokens(8, 3, 5), coders)

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 4]

    graph = build_graph(frozen, Logit(3, minus=4), max_features=8)
    report = faithfulness(frozen, graph, graph, Logit(3, minus=4), metric, reference=reference)
    assert report.edges < EXACT
    assert report.features is not None
    found = node_effects(frozen, metric, reference=reference, steps=32)
    assert abs(found.residual) < 1e-3 * (abs(found.whole - found.none) + 1)
    again = load_graph(save_graph(graph, tmp_path / "graph"))
    assert again.nodes == graph.nodes
    trace = trace_paths(frozen, Logit(3), k=10**6, length=2)
    assert abs(trace.paths[0].remainder) < EXACT
    split = patch_effects(model, tokens, Feature(coders[1], 2, 4), replace_by=5)
    assert float(split.residual.max()) < EXACT
    assert int((split.effect.abs() > 1e-9).sum()) >= 3  # tokens of the window, and those below it


@pytest.mark.parametrize("family", MAMBA)
def test_a_feature_taken_out_of_the_real_model(family):
    """All that it wrote at one position, recomputed by hand from the window of that pass; and while generating."""
    model, tokens = random_model(6, family, n_layers=2), random_tokens(6, 2, 6)
    coder = window_writer(model, 1, 3, skip=True)
    index = int(FrozenModel(model, tokens, coder).coded[1].codes.indices[0, 3, 0])
    edit, site = ScaleFeature(coder, index, 3), coder.cfg.out_site
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[coder.cfg.in_site, site])
        z = torch.stack([coder.encode(side_by_side(n, 3)) for n in cache[coder.cfg.in_site]])
        less = cache[site].clone().flatten(2)
        less[:, 3] -= z[:, 3, index, None] * coder.W_dec[index]
        new = less.reshape(cache[site].shape)
        expected = model.run_with_hooks(tokens, fwd_hooks=[(site, lambda value, hook: new)])
        with intervened(model, edit):
            assert torch.allclose(model(tokens), expected, atol=1e-12)
        assert (expected - model(tokens)).abs().max() > 1e-9

        edits = [ScaleFeature(coder, i, slice(2, None), 3.0) for i in range(11)]
        with intervened(model, edits):
            made = model.generate(tokens, 5, do_sample=False, stop_at_eos=False, verbose=False)
            logits = model(made)
        assert torch.equal(logits[:, 5:-1].argmax(-1), made[:, 6:])


def test_memory_before_the_run_is_not_in_a_window():
    """Graphs take zeros before the first position, and the error holds what is missed; the real model refuses."""
    model, tokens = random_model(3, "mamba", n_layers=2), random_tokens(3, 1, 5)
    coder = window_writer(model, 1, 3)
    state = model(random_tokens(9, 1, 4), return_state=True)[1].detach()
    frozen = FrozenModel(model, tokens, coder, initial_state=state)
    n = frozen.value_at(coder.cfg.in_site)[0]
    assert torch.allclose(frozen.latents(1)[0], coder.encode(side_by_side(n, 3)), atol=1e-12)
    found = attribute(frozen, targets=[Logit(3), Feature(coder, 2, 1)])
    assert found.residual.abs().max() < EXACT
    assert float(found.initial[0].abs().max()) > 1e-9
    with rewritten(model, [Rewrite(coder.cfg, lambda x, y: y)]), pytest.raises(ValueError, match="a window of 3"):
        model(tokens, initial_state=state)
