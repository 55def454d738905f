"""Nodes of every kind of branch: attention heads at a source, neurons, experts, beside mixers' channels."""

from __future__ import annotations

import pytest
import torch

from circuits import (
    Feature,
    FrozenModel,
    Logit,
    ScaleUnit,
    Unit,
    attribute,
    build_graph,
    edit_of,
    extract_circuit,
    frozen_effects,
    intervened,
)
from circuits.integrated import node_effects
from circuits.keep import Keep, only
from circuits.push import frozen_changes
from hooked_mamba.frozen.places import out_site
from hooked_mamba.model.hybrid import HookedHybrid
from tests.circuits.test_writes import EXACT, MANY, built
from tests.circuits.writes import writer
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.kinds import MAMBA

FEW = ("deltanet", "rwkv7", "falcon", "zamba2", "nemotron")
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in FEW else pytest.mark.slow) for k in MANY if k not in MAMBA]
)


@each_kind
def test_edges_are_what_removal_changes(kind):
    """Rows sum; on the frozen model a node of any kind taken away changes all others by minus its edges."""
    model, tokens = built(kind)
    frozen = FrozenModel(model, tokens)
    targets = [Logit(3), Logit(5, 3)]
    graph = build_graph(frozen, targets, max_heads=120)
    assert float(graph.residual().abs().max()) < EXACT
    branches = {name for layer in range(model.cfg.n_layers) for name in model.block(layer).branches}
    branches |= {"v_first"} if kind == "rwkv7" else set()
    heads = [i for i, node in enumerate(graph.nodes) if node.kind == "head"]
    assert {graph.nodes[i].branch for i in heads} == branches
    assert len({node.label for node in graph.nodes}) == len(graph)
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "head")]
    assert torch.allclose(frozen_changes(frozen, graph, targets, ends), -graph.weights[:, ends].t(), atol=EXACT)
    inner = [Unit(graph.nodes[i].part, graph.nodes[i].index, graph.nodes[i].position) for i in heads]
    rows = graph.where("target", "head")
    one_of_each = {graph.nodes[i].branch: i for i in heads}
    for i in one_of_each.values():
        effect = frozen_effects(frozen, edit_of(frozen, graph.nodes[i]), [*targets, *inner], hold=graph)[:, 0]
        assert torch.allclose(effect, -graph.weights[rows, i], atol=EXACT), graph.nodes[i].label


@each_kind
def test_nodes_kept_in_the_real_model(kind):
    model, tokens = built(kind)
    frozen = FrozenModel(model, tokens)
    everything = Keep.everything(frozen)
    with torch.no_grad(), only(frozen, everything):
        assert torch.allclose(model(tokens), frozen.logits, atol=1e-9)
    others = [part for i in range(model.cfg.n_layers) for part in frozen.parts(i) if not isinstance(part, int)]
    if not others:
        return
    part = others[-1]
    everything.heads[part][-1] = False
    site = out_site(model, *frozen.branch_of(part))
    with torch.no_grad(), only(frozen, everything):
        _, without = model.run_with_cache(tokens)
    lost = frozen.cache[site] - without[site]
    expected = frozen.chain(part).push(own(frozen, part), torch.zeros(1, dtype=torch.long), start="u")[0]
    assert torch.allclose(lost, expected, atol=1e-9)


def own(frozen, part):
    """What a branch passes on from the last position alone."""
    u = torch.zeros_like(frozen.chain(part).u)
    u[:, -1] = frozen.chain(part).u[:, -1]
    return u


@pytest.mark.parametrize("case", ["bamba", "falcon", "granite-moe", "nemotron"])
@torch.no_grad()
def test_scaled_units_in_the_real_model(case):
    """Against what the sites themselves say: a head's term, a neuron's column, an expert's output."""
    model, tokens = hybrids.tiny(case).model, hybrids.tokens_for(2, 6)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    seen = set()
    for layer in range(model.cfg.n_layers):
        for name, branch in model.block(layer).branches.items():
            if name == "mixer" or name in seen:
                continue
            seen.add(name)
            at = f"blocks.{layer}.{name}."
            index = int(cache[f"{at}hook_expert_indices"][0, 2, 1]) if name == "moe" else 1
            with intervened(model, ScaleUnit(f"{layer}.{name}", index, 2, 0.25)):
                _, changed = model.run_with_cache(tokens, names_filter=lambda name: True)
            moved = changed[f"{at}hook_out"] - cache[f"{at}hook_out"]
            if name == "attn":
                v = cache[f"{at}hook_v"][:, 2, index // (branch.cfg.n_heads // branch.cfg.n_key_value_heads)]
                z = -0.75 * cache[f"{at}hook_pattern"][:, index, :, 2, None] * v[:, None]
                c = branch.cfg.d_head
                expected = z @ branch.o_proj.weight[:, index * c : (index + 1) * c].t()
            elif name == "mlp":
                expected = torch.zeros_like(moved)
                expected[:, 2] = -0.75 * cache[f"{at}hook_post"][:, 2, [index]] * branch.down_proj.weight[:, index]
            else:
                mine = cache[f"{at}hook_expert_indices"][:, 2] == index
                weights = cache[f"{at}hook_expert_weights"][:, 2] * mine
                each = (cache[f"{at}hook_expert_out"][:, 2] * weights.unsqueeze(-1)).sum(1)
                expected = torch.zeros_like(moved)
                expected[:, 2] = -0.75 * (each if branch.cfg.d_latent is None else each @ branch.latent_out.weight.t())
            assert torch.allclose(moved, expected, atol=1e-10), name
            assert float(moved.abs().max()) > 1e-6
    assert seen


@torch.no_grad()
def test_scaled_units_while_generating():
    """What a head passes on from the prompt stays scaled in later calls, and what does not exist yet is scaled then."""
    model, tokens = hybrids.tiny("falcon").model, hybrids.tokens_for(1, 6)
    edits = [ScaleUnit("1.attn", 2, [1, 3, 7], 4.0), ScaleUnit("0.mlp", 4, [2, 7], 9.0)]
    with intervened(model, edits):
        made = model.generate(tokens, 5, do_sample=False, verbose=False, return_type="tokens")
        kept = {}

        def watch(logits, hook):
            kept.setdefault("all", []).append(logits[:, -1].clone())

        with model.hooks([("hook_logits", watch)]):
            model.generate(tokens, 5, do_sample=False, verbose=False, return_type="tokens")
    stepwise = torch.stack(kept["all"], 1)
    edits = [ScaleUnit(e.part, e.index, [t for t in e.positions if t < made.shape[1]], e.factor) for e in edits]
    with intervened(model, edits):
        whole = model(made)[:, 5 : 5 + stepwise.shape[1]]
    assert torch.allclose(stepwise, whole, atol=1e-9)
    assert not torch.allclose(whole, model(made)[:, 5 : 5 + stepwise.shape[1]])


def test_a_circuit_of_a_hybrid_and_its_checks():
    model, tokens = built("bamba")

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 4]

    found = extract_circuit(model, [], tokens, Logit(3, minus=4), 30, reference=hybrids.tokens_for(3, 5, 4))
    assert found.report.edges < EXACT
    assert found.report.recovery.nodes <= 30
    frozen = found.frozen
    effects = node_effects(frozen, metric, reference=FrozenModel(model, hybrids.tokens_for(3, 5, 4)), steps=24)
    assert abs(effects.residual) < 1e-2 * (abs(effects.whole) + abs(effects.none))
    mixers = FrozenModel(model, tokens, units=["mixer"])
    assert {type(part) for part in mixers.open_parts()} == {int}
    assert {node.branch for node in build_graph(mixers, Logit(3)).nodes} == {"mixer"}
    assert {type(part) for part in FrozenModel(model, tokens, selection="gradient").open_parts()} == {int}
    with pytest.raises(ValueError, match="units of attention: the blocks have attn, mixer, mlp"):
        FrozenModel(model, tokens, units=["attention"])


@pytest.mark.parametrize("read", ["norm2.hook_out", "norm2.hook_normalized", "hook_resid_mid"])
def test_coders_on_other_branches_beside_units(read):
    """A dictionary of an MLP's output, a write dictionary of attention, and heads, neurons and channels left."""
    model, tokens = built("falcon")
    assert isinstance(model, HookedHybrid)
    from saes import SparseCoder, sae_config
    from tests.circuits.writes import noisy

    d = model.cfg.d_model
    block = noisy(SparseCoder(sae_config("blocks.1.hook_mlp_out", d, 11, k=3), seed=3), 3)
    into = sae_config("blocks.0.hook_mlp_out", d, 11, k=3).replace(
        in_site=f"blocks.0.{read}",
        target="block",
        reads="resid" if "resid" in read else "normalized",
        apply_b_dec_to_input=False,
        skip=True,
    )
    transcoder = noisy(SparseCoder(into, seed=4), 4)
    coders = [block, transcoder, writer(model, "2.attn", seed=5)]
    frozen = FrozenModel(model, tokens, coders)
    assert {part: coded.mode for part, coded in frozen.coded.items()} == {
        "0.mlp": "block", "1.mlp": "block", "2.attn": "write",
    }  # fmt: skip
    targets = [Logit(3), Feature(transcoder, 2, 3)]
    own = attribute(frozen, targets=targets[1])
    assert own.residual.abs().max() < EXACT
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=into.in_site)
        assert torch.allclose(own.target, transcoder.preact(cache[into.in_site][:, 3])[:, 2], atol=1e-12)
    graph = build_graph(frozen, targets, max_features=20, max_heads=20)
    assert float(graph.residual().abs().max()) < EXACT
    assert {node.part for node in graph.nodes if node.kind == "feature"} == {"0.mlp", "1.mlp", "2.attn"}
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "error", "feature", "head")]
    assert torch.allclose(frozen_changes(frozen, graph, targets, ends), -graph.weights[:, ends].t(), atol=EXACT)
    for i in (i for i in ends if graph.nodes[i].kind == "feature"):
        effect = frozen_effects(frozen, edit_of(frozen, graph.nodes[i]), targets, hold=graph)
        assert torch.allclose(effect[0], -graph.weights[0, i], atol=EXACT)


def test_what_is_refused():
    model, tokens = built("falcon")
    frozen = FrozenModel(model, tokens)
    with pytest.raises(ValueError, match="block 1 has no branch 'moe'; it has mixer, attn, mlp"):
        frozen_effects(frozen, ScaleUnit("1.moe", 0), Logit(3))
    with pytest.raises(IndexError, match=r"unit 99 of 1\.attn is out of range: it has 4"):
        frozen_effects(frozen, ScaleUnit("1.attn", 99), Logit(3))
    with pytest.raises(KeyError, match="block 1 has no branch 'moe'"):
        attribute(frozen, targets=Unit("1.moe", 0, 2))
    mamba, text = built("mamba")
    with pytest.raises(ValueError, match="in layer 1 the value itself decides what is written and read: use CutHead"):
        frozen_effects(FrozenModel(mamba, text), ScaleUnit(1, 0), Logit(3))


@torch.no_grad()
def test_the_value_that_rwkv_hands_on():
    """A node, and an edit of what later layers take of it; layer 0's own value stays."""
    model, tokens = built("rwkv7")
    frozen = FrozenModel(model, tokens, units=["v_first"])
    graph = build_graph(frozen, Logit(3))
    nodes = [node for node in graph.nodes if node.kind == "head"]
    assert [node.label.partition("@")[0] for node in nodes] == ["v_first0[0]"] * len(nodes)
    found = attribute(FrozenModel(model, tokens), targets=Logit(3)).carried["v_first"][0]
    weights = graph.weights[0, graph.where("head")]
    assert torch.allclose(weights, found[[node.position for node in nodes]], atol=EXACT)
    with intervened(model, ScaleUnit("0.v_first", 0, 2, 0.5)):
        _, changed = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens)
    for site, same in (("hook_v", True), ("hook_v_first", False)):
        mine, theirs = (c[f"blocks.0.mixer.{site}"] for c in (changed, cache))
        assert torch.equal(mine, theirs) == same
    assert torch.equal(changed["blocks.0.mixer.hook_v_first"][:, 2], 0.5 * cache["blocks.0.mixer.hook_v_first"][:, 2])
    everything = Keep.everything(frozen)
    everything.heads["0.v_first"][2] = False
    with only(frozen, everything):
        _, without = model.run_with_cache(tokens)
    assert not without["blocks.0.mixer.hook_v_first"][:, 2].any()
    with pytest.raises(IndexError, match=r"unit 1 of 0\.v_first is out of range: it is one"):
        frozen_effects(frozen, ScaleUnit("0.v_first", 1), Logit(3))
