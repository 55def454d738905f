"""The graph's JSON in circuit-tracer's schema: each number is what that program's reader takes it for."""

import re

import pytest

from circuits import Feature, FrozenModel, Logit, build_graph
from circuits.files import to_circuit_tracer
from tests.hooked_mamba.tiny import tokens_for
from tests.saes.models import mambacoder_on, tiny


@pytest.fixture(scope="module")
def made():
    model = tiny("mamba")
    tokens, coder = tokens_for(model, rows=1), mambacoder_on(model, 1)
    run = FrozenModel(model, tokens, coder)
    targets = [Logit(5), Logit(2), Logit(3, minus=4), Logit(5, position=-2), Feature(coder, 7)]
    graph = build_graph(run, targets, max_heads=4, max_features=6)
    return model, tokens[0], graph, to_circuit_tracer(graph, "x")


def test_probabilities_are_the_models(made):
    model, tokens, _, found = made
    p = model(tokens)[0].detach().softmax(-1)
    expected = [p[-1, 5], p[-1, 2], p[-1, 3], p[-2, 5], 0.0]
    targets = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert [node["token_prob"] for node in targets] == pytest.approx([float(x) for x in expected])
    for node in targets:
        shown = re.search(r"\(p=([\d.]+)\)$", node["clerp"])
        assert float(shown[1]) == pytest.approx(node["token_prob"], abs=1e-3)
        assert node["influence"] is None
        assert node["layer"] == str(model.cfg.n_layers + 1)
    assert all(node["token_prob"] == 0 for node in found["nodes"] if node["feature_type"] != "logit")


def test_numbers_of_features_tokens_and_errors(made):
    _, tokens, graph, found = made
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    for node, ours in zip(found["nodes"], graph.nodes, strict=True):
        layer, index, position = node["node_id"].rsplit("_", 2)
        assert layer == node["layer"]
        assert int(position) == node["ctx_idx"]
        if ours.kind == "feature":
            assert int(index) == ours.index
            total = ours.layer + ours.index
            assert node["feature"] == total * (total + 1) // 2 + ours.index
        if ours.kind == "embed":
            assert (int(index), node["feature"]) == (int(tokens[ours.position]), ours.position)
        if ours.kind == "error":
            assert (int(index), node["feature"]) == (-1, -1)
    logits = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert [node["feature"] for node in logits[:3]] == [5, 2, 3]
    assert all(link["source"] in ids and link["target"] in ids for link in found["links"])
