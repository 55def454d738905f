"""A mixer that declares its linear form is taken apart, cut, coded and traced, with no other file touched."""

from __future__ import annotations

import pytest
import torch

from circuits import (
    Channel,
    Direction,
    FrozenModel,
    Logit,
    attribute,
    build_graph,
    extract_circuit,
    node_effects,
    patch_effects,
    trace_paths,
)
from circuits.interventions import CutHead, CutTokens, ScaleEmbedding, frozen_effects, intervened
from circuits.push import frozen_changes
from hooked_mamba.analysis import weight_views
from hooked_mamba.analysis.direct_logits import direct_logit_attribution
from hooked_mamba.analysis.hidden_attention import attention_rollout
from hooked_mamba.analysis.knockout import knockout
from hooked_mamba.analysis.memory_probes import half_life, receptive_field, write_survival
from saes import SparseCoder, mambacoder_config
from saes.targets import local_part
from tests.hooked_mamba.toy import HookedToy, ToyMixer


def toy(n_layers=2):
    config = HookedToy.config_class(d_model=6, n_layers=n_layers, d_vocab=17, expand=2)
    return HookedToy(config, seed=3).double()


def tokens_for(batch=2, length=7, seed=0):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_hidden_attention_is_the_scan():
    model, tokens = toy(), tokens_for()
    _, cache = model.run_with_cache(tokens)
    alpha = cache.hidden_attention(1)
    a = model.mixer(1).a.detach()
    for t in range(7):
        for s in range(7):
            expected = a ** (t - s) if s <= t else 0 * a
            assert torch.allclose(alpha[0, :, t, s], expected, atol=1e-12)
    y = torch.einsum("bhts,bsh->bth", alpha, cache["blocks.1.mixer.hook_v"])
    assert torch.allclose(y, cache["blocks.1.mixer.hook_h"], atol=1e-12)
    assert torch.allclose(cache.hidden_attention(1, average=True), alpha.mean(1))
    assert torch.allclose(cache.hidden_attention(1, [2, 0], [-1]), alpha[:, [2, 0]][:, :, [-1]])
    assert torch.allclose(cache.compute_ssm_state(1, 4), cache["blocks.1.mixer.hook_h"][:, 4])
    assert torch.allclose(write_survival(cache, 1, 2)[0, 4], a**2)
    assert receptive_field(cache, 1).reach.shape == (2, 7, model.cfg.E)
    assert torch.allclose(attention_rollout(cache).sum(-1), torch.ones(2, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="has no step size dt"):
        half_life(cache, 1)


def test_decompositions_sum():
    model, tokens = toy(), tokens_for()
    logits, cache = model.run_with_cache(tokens)
    stream = cache["resid_post", 1]
    assert torch.allclose(cache.decompose_resid().sum(0), stream)
    assert torch.allclose(cache.stack_channel_results(incl_remainder=True).sum(0), stream)
    parts, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert torch.allclose(parts.sum(0), stream)
    assert labels[:2] == ["L0C0", "L0C1"]
    assert len(labels) == 2 * model.cfg.E + 2
    for source in ("scan", "token"):
        assert torch.allclose(cache.stack_source_results(1, source).sum(0), cache["blocks.1.mixer.hook_out"])
    found = direct_logit_attribution(cache, 3, by="channel")
    assert torch.allclose(found.values.sum(0), logits[:, -1, 3])
    with pytest.raises(ValueError, match="Toy has no heads"):
        cache.stack_head_results()
    assert torch.allclose(weight_views.fold_norms(model)(tokens).log_softmax(-1), logits.log_softmax(-1))


def replay(model, tokens, off=()):
    """The logits with gates and norms held at the run's, in loops; `off`: (layer, source, target, channel) left out."""
    _, cache = model.run_with_cache(tokens)
    x = cache["embed"][0]
    for i in range(model.cfg.n_layers):
        block, mixer = model.blocks[i], model.mixer(i)
        n = x / cache["scale", i][0] * block.norm.weight
        v, g = n @ mixer.in_proj.weight.t() + mixer.in_proj.bias, cache[f"blocks.{i}.mixer.hook_g"][0]
        h = torch.zeros_like(v)
        for t in range(len(x)):
            for s in range(t + 1):
                for e in range(v.shape[1]):
                    if (i, s, t, e) not in off:
                        h[t, e] += mixer.a[e] ** (t - s) * v[s, e]
        x = x + (g * h) @ mixer.out_proj.weight.t() + mixer.out_proj.bias
    return x / cache["scale"][0] * model.ln_final.weight @ model.unembed.weight.t()


def test_attribution_is_what_the_replay_says():
    model, tokens = toy(), tokens_for(1, 5)
    with torch.no_grad():
        whole = replay(model, tokens)[-1, 3]
        found = attribute(model, (), tokens, Logit(3))
        assert abs(float(found.target - whole)) < 1e-10
        assert found.residual.abs().max() < 1e-12
        for layer, s, e in ((0, 1, 2), (1, 3, 0), (1, 4, 5)):
            off = {(layer, s, t, e) for t in range(5)}
            effect = whole - replay(model, tokens, off)[-1, 3]
            assert abs(float(found.heads[layer][0, s, e] - effect)) < 1e-10
            assert abs(float(found.token_heads[layer][0, s, e] - effect)) < 1e-10


@pytest.mark.parametrize("start", ["empty", "padded", "going on"])
def test_sums_of_everything(start):
    model, tokens = toy(), tokens_for()
    run = {}
    if start == "padded":
        run = {"attention_mask": torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])}
    elif start == "going on":
        run = {"initial_state": model(tokens_for(seed=1), return_state=True)[1].detach()}
    targets = [Logit(3), Channel(1, 2, 3), Direction(torch.ones(6, dtype=torch.float64), 0, -1, stream="out")]
    for target in ("block", "local"):
        coders = [SparseCoder(mambacoder_config(i, 6, 24, k=3, target=target), seed=i).double() for i in range(2)]
        coders = [coder_on(coder) for coder in coders]
        assert attribute(model, coders, tokens, targets, **run).residual.abs().max() < 1e-12
    frozen = FrozenModel(model, tokens, **run)
    assert attribute(frozen, targets=targets).residual.abs().max() < 1e-12
    gradient = FrozenModel(model, tokens, selection="gradient", **run)
    assert not torch.allclose(
        attribute(gradient, targets=Logit(3)).embeddings, attribute(frozen, targets=Logit(3)).embeddings
    )
    with pytest.raises(ValueError, match="'half' is not defined for Toy"):
        attribute(FrozenModel(model, tokens, selection="half", **run), targets=Logit(3))


def coder_on(coder):
    """The same coder on the toy's output."""
    site = f"blocks.{coder.cfg.layer}.mixer.hook_out"
    import dataclasses

    return SparseCoder(dataclasses.replace(coder.cfg, out_site=site), seed=coder.cfg.layer).double()


def test_the_local_part_is_what_the_own_input_gives():
    model, tokens = toy(), tokens_for(1, 5)
    _, cache = model.run_with_cache(tokens)
    mixer = model.mixer(1)
    v = cache["blocks.1.mixer.hook_v"] - mixer.in_proj.bias
    expected = (cache["blocks.1.mixer.hook_g"] * v) @ mixer.out_proj.weight.t()
    assert torch.allclose(local_part(model, 1, cache), expected)


def test_knockout_and_interventions():
    model, tokens = toy(), tokens_for(1, 6)
    with torch.no_grad(), knockout(model, [1], [4], layers=1, source="scan"):
        _, cut = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens)
    lost = model.mixer(1).a ** 3 * cache["blocks.1.mixer.hook_v"][0, 1]
    change = cache["blocks.1.mixer.hook_h"] - cut["blocks.1.mixer.hook_h"]
    assert torch.allclose(change[0, 4], lost)
    assert change[0, 5].abs().max() == 0
    frozen = FrozenModel(model, tokens)
    edits = [ScaleEmbedding(1), CutHead(1, 2, [0, 1]), CutTokens([1, 2], [4, 5])]
    with torch.no_grad(), intervened(model, edits):
        assert not torch.allclose(model(tokens), cache["logits"])
    head = frozen_effects(frozen, CutHead(1, 2, 0), Logit(3))
    assert torch.allclose(head[0], -attribute(frozen, targets=Logit(3)).heads[1][:, 2, 0])


def test_graphs_paths_and_patching():
    model, tokens = toy(), tokens_for(1, 6)
    frozen = FrozenModel(model, tokens)
    graph = build_graph(frozen, [Logit(3)], max_heads=8)
    assert float(graph.residual().abs().max()) < 1e-10
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "head")]
    assert torch.allclose(frozen_changes(frozen, graph, Logit(3), ends), -graph.weights[:, ends].t(), atol=1e-10)
    paths = trace_paths(frozen, Logit(3), k=10**6, length=3).paths
    ended = [path for some in paths for path in some if path.nodes[-1].kind != "head"]
    assert abs(sum(path.weight for path in ended) - float(attribute(frozen, targets=Logit(3)).target)) < 1e-10
    effects = patch_effects(frozen, target=3, replace_by=[2, 5])
    assert effects.residual.abs().max() < 1e-10
    found = node_effects(frozen, lambda logits: logits[:, -1, 3], steps=24)
    assert abs(found.residual) < 1e-3 * abs(found.whole - found.none)
    circuit = extract_circuit(model, [], tokens, Logit(3), budget=10)
    assert circuit.report is not None
    assert circuit.report.edges < 1e-10


def test_it_is_one_short_file():
    import inspect

    assert len(inspect.getsource(ToyMixer).splitlines()) <= 60
