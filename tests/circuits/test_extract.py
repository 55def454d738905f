"""From prompt to circuit: the real model with nodes ablated, the checks' controls, graphs on disk and elsewhere."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import networkx
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits import (
    Channel,
    FrozenModel,
    Logit,
    build_graph,
    extract_circuit,
    load_graph,
    prune,
    save_graph,
    top_logits,
)
from circuits.faithfulness import faithfulness, recovery, spearman
from circuits.files import to_circuit_tracer, to_networkx
from circuits.keep import Keep, only
from hooked_mamba import HookedMamba
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for
from tests.circuits.test_graph import graph_of
from tests.kinds import MAMBA

FAMILIES = MAMBA


def frozen_for(family, target, seed=5):
    model = random_model(seed, family, n_layers=3)
    coders = [] if target is None else coders_for(model, target, skip=True)[1:]
    return FrozenModel(model, random_tokens(seed, 1, 6), coders)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [None, "block", "local"])
@torch.no_grad()
def test_keeping_everything_changes_nothing(family, target):
    frozen = frozen_for(family, target)
    reference = FrozenModel(frozen.model, random_tokens(1, 3, 6), [coded.coder for coded in frozen.coded.values()])
    for other in (None, reference):
        with only(frozen, Keep.everything(frozen), other) as model:
            assert torch.allclose(model(frozen.tokens), frozen.logits, atol=1e-10)
    assert torch.equal(frozen.model(frozen.tokens), frozen.logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_nothing_is_ablating_every_scan(family):
    frozen = frozen_for(family, None)
    names = [f"blocks.{i}.mixer.hook_y" for i in range(3)]
    expected = frozen.model.run_with_hooks(frozen.tokens, fwd_hooks=[(n, lambda y, hook: y * 0) for n in names])
    with only(frozen, Keep.nothing(frozen)) as model:
        assert torch.allclose(model(frozen.tokens), expected, atol=1e-12)


@torch.no_grad()
def test_one_head_alone_is_one_term_of_the_scan():
    frozen = frozen_for("mamba", None)
    keep = Keep.everything(frozen)
    keep.heads[1][:] = False
    keep.heads[1][2, 3] = True
    with only(frozen, keep):
        _, cache = frozen.model.run_with_cache(frozen.tokens)
    alpha = frozen.cache.hidden_attention(1, channels=3)[0]
    _, whole = frozen.model.run_with_cache(frozen.tokens)
    expected = torch.zeros_like(whole["y", 1][0])
    expected[:, 3] = alpha[:, 2] * whole["x", 1][0, 2, 3]
    assert torch.allclose(cache["y", 1][0], expected, atol=1e-12)


@torch.no_grad()
def test_latents_kept_are_what_a_splice_says():
    from saes import splice

    frozen = frozen_for("mamba", "block")
    keep = Keep.everything(frozen)
    for layer in frozen.coded:
        keep.errors[layer][:] = False
    with only(frozen, keep) as model:
        found = model(frozen.tokens)
    with splice(frozen.model, [coded.coder for coded in frozen.coded.values()]):
        expected = frozen.model(frozen.tokens)
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("target", [None, "block", "local"])
def test_a_circuit_in_one_call(target):
    model, tokens = random_model(5, n_layers=2), random_tokens(5, 1, 6)
    coders = [] if target is None else coders_for(model, target)
    circuit = extract_circuit(model, coders, tokens, Logit(3, minus=4), budget=10, reference=random_tokens(9, 4, 6))
    assert int(circuit.graph.where("feature", "head").sum()) <= 10
    assert circuit.report is not None
    assert circuit.report.edges < 1e-9
    assert circuit.report.recovery.nodes <= 10
    assert len(circuit.report.recovery.random) == 5
    assert (circuit.report.features is None) == (target is None)
    assert -1 <= circuit.report.patching <= 1
    text = str(circuit)
    assert "all other paths" in text
    assert "recover" in text
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_checks_leave_gradients_as_they_are():
    frozen = frozen_for("mamba", None)
    for parameter in frozen.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    recovery(frozen, Keep.everything(frozen), lambda logits: logits[:, -1, 3])
    assert all(bool((parameter.grad == 3).all()) for parameter in frozen.model.parameters())


@pytest.mark.parametrize("target", [None, "block"])
@pytest.mark.parametrize("selection", ["none", "half", "gradient"])
def test_a_circuit_of_what_ablation_says(target, selection):
    model, tokens = random_model(5, n_layers=2), random_tokens(5, 1, 6)
    coders = [] if target is None else coders_for(model, target)
    circuit = extract_circuit(
        model, coders, tokens, Logit(3, minus=4), budget=9, choose="integrated", selection=selection
    )
    assert int(circuit.graph.where("feature", "head").sum()) == 9  # chosen nodes stay, with edges or without
    assert circuit.graph.residual().abs().max() < 1e-10
    assert circuit.report is not None
    assert circuit.report.recovery.nodes == 9
    assert (circuit.report.edges is None) == (selection != "none")
    assert circuit.report.edges is None or circuit.report.edges < 1e-9
    assert "(a) edges against removal" in str(circuit.report)


def test_a_circuit_of_everything_recovers_everything():
    model, tokens = random_model(5, "mamba", n_layers=2), random_tokens(5, 1, 6)
    many = 2 * 6 * model.cfg.E
    circuit = extract_circuit(model, [], tokens, 3, budget=many, prune_nodes=1.0, prune_edges=1.0)
    assert circuit.report is not None
    # Heads whose term adds nothing to the target directly are no nodes; through selection they matter a little.
    assert circuit.report.recovery.circuit == pytest.approx(1, abs=0.2)


def test_without_a_target_the_likely_tokens_are_explained():
    model, tokens = random_model(5, "mamba", n_layers=1), random_tokens(5, 1, 6)
    circuit = extract_circuit(model, [], tokens, budget=5, check=False)
    p = circuit.frozen.logits[0, -1].softmax(-1)
    best = p.argmax()
    assert circuit.targets[0] == Logit(int(best))
    chosen = sum(float(p[t.token]) for t in circuit.targets)
    assert chosen >= 0.95 or len(circuit.targets) == 10
    fewer = top_logits(circuit.frozen, p=0.5, most=3)
    assert fewer == circuit.targets[: len(fewer)]
    assert sum(float(p[t.token]) for t in fewer) >= 0.5 or len(fewer) == 3
    with pytest.raises(ValueError, match="p must be above 0"):
        top_logits(circuit.frozen, p=0.0)


def test_likely_tokens_have_their_texts():
    model = HookedMamba.from_pretrained("tinystories-4l")
    found = top_logits(FrozenModel(model, "I like to eat toast for breakfast. I'm so"), most=3)
    assert found[0].token == " hungry"
    assert [model.to_single_token(one.token) if isinstance(one.token, str) else one.token for one in found] == (
        model("I like to eat toast for breakfast. I'm so")[0, -1].topk(3).indices.tolist()
    )


def test_errors_say_what_is_wrong():
    frozen = frozen_for("mamba", None)
    with pytest.raises(ValueError, match="masks of True and False"):
        build_graph(frozen, Logit(3), keep=Keep({0: torch.full((6, frozen.model.cfg.E), 0.5)}, {}, {}))
    with pytest.raises(ValueError, match="choose must be 'influence' or 'integrated', got 'best'"):
        extract_circuit(random_model(5), [], random_tokens(5), 3, choose="best")
    frozen = frozen_for("mamba", None)
    with pytest.raises(ValueError, match="no target: give a Logit"):
        extract_circuit(frozen.model, [], frozen.tokens, [])
    with pytest.raises(ValueError, match="no target: give a Logit"):
        build_graph(frozen, [])
    with pytest.raises(ValueError, match=r"no metric for mixer0\[1\]@2: pass metric="):
        extract_circuit(frozen.model, [], frozen.tokens, Channel(0, 1, 2), check=False, choose="integrated")
    coded = frozen_for("mamba", "block")
    bare = FrozenModel(coded.model, random_tokens(1, 3, 6))
    with (
        pytest.raises(ValueError, match=r"not read through the coders of layers \[1, 2\]"),
        only(coded, Keep.everything(coded), bare),
    ):
        pass
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        extract_circuit(frozen.model, [], frozen.tokens, 3, budget=0)
    with (
        pytest.raises(ValueError, match="the reference has 4 positions, this run 6"),
        only(frozen, Keep.everything(frozen), FrozenModel(frozen.model, random_tokens(1, 2, 4))),
    ):
        pass


def test_rank_correlation():
    a = torch.tensor([0.1, 3.0, 2.0, 2.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.3162, abs=1e-3)
    assert math.isnan(spearman(a, torch.ones(4)))


# Files -------------------------------------------------------------------------------------------------------


def test_a_graph_on_disk(tmp_path):
    _, graph = graph_of(5, "local")
    graph = graph.with_supernode("food <b>", [1, 2]).renamed({3: "said \u2028 so"})
    save_graph(graph, tmp_path / "g")
    again = load_graph(tmp_path / "g")
    assert again.nodes == graph.nodes
    assert torch.equal(again.weights, graph.weights)
    assert torch.equal(again.remainder, graph.remainder)
    assert (again.tokens, again.supernodes, again.about) == (graph.tokens, graph.supernodes, graph.about)
    save_graph(prune(graph).graph, tmp_path / "g")  # replaces it
    assert len(load_graph(tmp_path / "g")) < len(graph)


BREAKS = {
    "not JSON": lambda d: (d / "graph.json").write_text("{"),
    "a list": lambda d: (d / "graph.json").write_text("[]"),
    "another format": lambda d: edit(d, lambda about: about.update(format=99)),
    "an unknown kind": lambda d: edit(d, lambda about: about["nodes"][0].update(kind="neuron")),
    "an unknown field": lambda d: edit(d, lambda about: about["nodes"][0].update(positon=1)),
    "a node less": lambda d: edit(d, lambda about: about["nodes"].pop()),
    "a node twice": lambda d: edit(d, lambda about: about["nodes"].__setitem__(1, about["nodes"][0])),
    "a text for a number": lambda d: edit(d, lambda about: about["nodes"][0].update(layer="3")),
    "no tokens": lambda d: edit(d, lambda about: about.pop("tokens")),
    "a supernode of nothing": lambda d: edit(d, lambda about: about.update(supernodes={"x": [10_000]})),
    "weights of fewer nodes": lambda d: shorten(d),
    "torn weights": lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:90]),
}


def shorten(folder):
    tensors = load_file(folder / "weights.safetensors")
    save_file({name: value[1:].contiguous() for name, value in tensors.items()}, folder / "weights.safetensors")


def edit(folder, change):
    about = json.loads((folder / "graph.json").read_text())
    change(about)
    (folder / "graph.json").write_text(json.dumps(about))


@pytest.mark.parametrize("how", BREAKS)
def test_broken_files(tmp_path, how, unchecked):
    _, graph = graph_of(1, "block")
    save_graph(graph, tmp_path)
    BREAKS[how](tmp_path)
    with pytest.raises(ValueError, match=r"."):
        load_graph(tmp_path)


def test_numbers_that_are_none(tmp_path):
    _, graph = graph_of(1, "block")
    graph.weights[0, 1] = float("nan")
    save_graph(graph, tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        load_graph(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors is missing"):
        load_graph(tmp_path)


def test_networkx():
    _, graph = graph_of(5, "local")
    other = to_networkx(graph)
    assert networkx.is_directed_acyclic_graph(other)
    assert other.number_of_nodes() == len(graph)
    assert other.number_of_edges() == int((graph.weights != 0).sum())
    source, target, data = next(iter(other.edges(data=True)))
    assert data["weight"] == pytest.approx(float(graph.weights[target, source]))


def test_the_json_of_circuit_tracer():
    _, graph = graph_of(5, "local")
    found = to_circuit_tracer(prune(graph).graph.with_supernode("s", [0]), "a-slug")
    assert set(found) == {"metadata", "qParams", "nodes", "links"}
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    for link in found["links"]:
        assert {link["source"], link["target"]} <= set(ids)
    for node in found["nodes"]:
        layer, _, position = node["node_id"].split("_")
        assert (layer, int(position)) == (node["layer"], node["ctx_idx"])
        if node["feature_type"] == "logit":  # their front end takes the probability from the title, and fails without
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=1e-3)
    required = {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold"}  # their data classes
    assert required <= set(found["metadata"])
    assert set(found["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(ValueError, match="slug"):
        to_circuit_tracer(graph, "a b")


def test_what_a_graph_explains_can_be_weighted():
    frozen, _ = graph_of(1, "block")
    graph = build_graph(frozen, [Logit(3), Logit(4)], importance=[3, 1])
    assert graph.importance[:2].tolist() == [0.75, 0.25]


def test_errors_that_are_kept_count_for_no_node():
    frozen = frozen_for("mamba", "block")
    keep = Keep.everything(frozen)
    found = recovery(frozen, keep, lambda logits: logits[:, -1, 3], randoms=0)
    assert found.nodes == sum(mask.numel() for part in (keep.heads, keep.features) for mask in part.values())
    assert found.nodes < len(keep)


def test_features_of_which_a_graph_foretells_nothing_are_not_turned_up():
    frozen = frozen_for("mamba", "block")
    graph = build_graph(frozen, Logit(3), max_features=6, max_heads=0)
    features = graph.where("feature").nonzero()[:, 0].tolist()
    assert len(features) == 6

    def turned_up(left_out):
        weights = graph.weights.clone()
        weights[:, left_out] = 0
        cut = replace(graph, weights=weights)
        return faithfulness(frozen, graph, cut, Logit(3), lambda logits: logits[:, -1, 3], randoms=0).features

    assert turned_up([]).right > 0
    assert turned_up(features[1:]).right in (0, 1)  # one is left, and is the only one that counts
    assert turned_up(features) is None
