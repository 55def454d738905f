"""Graphs: rows that sum, influence against enumeration, paths against all paths, pruning."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from circuits import FrozenModel, Graph, Logit, Node, build_graph, greedy_path, influence, prune, scores, top_paths
from circuits.influence import edge_influence, total_effects
from circuits.targets import Channel, Feature
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for


def graph_of(seed=5, target="local", n_layers=2, **budget):
    model = random_model(seed, n_layers=n_layers)
    coders = [] if target is None else coders_for(model, target)
    frozen = FrozenModel(model, random_tokens(seed, 1, 5), coders)
    budget = {"max_features": 12, "max_heads": 8} | budget
    return frozen, build_graph(frozen, [Logit(3), Logit(4, 3)], **budget)


@pytest.mark.parametrize("target", [None, "block", "local"])
@pytest.mark.parametrize("seed", [1, 5, 8])
def test_rows_sum_to_values(seed, target):
    _, graph = graph_of(seed, target)
    assert graph.residual().abs().max() < 1e-10
    assert (graph.weights[~graph.where("target", "feature", "head")] == 0).all()
    _, thin = graph_of(seed, target, max_features=2, max_heads=3)
    assert thin.residual().abs().max() < 1e-10
    assert int(thin.where("feature").sum()) <= 2
    assert int(thin.where("head").sum()) <= 3


def test_rows_in_a_file_give_the_same_graph(tmp_path):
    frozen, graph = graph_of(5, "local")
    again = build_graph(frozen, [Logit(3), Logit(4, 3)], max_features=12, max_heads=8, batch=3, offload=tmp_path)
    assert torch.allclose(again.weights, graph.weights, atol=1e-12)
    assert [node.key for node in again.nodes] == [node.key for node in graph.nodes]
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        build_graph(frozen, Logit(3), offload=tmp_path / "nowhere")


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr("circuits.effect_rows.available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"rows of \d+ effects would take .* or keep the rows in a file"):
        graph_of(5, "local")


def test_every_edge_is_a_direct_effect():
    """Each feature's and head's row, once more by the attribution that its target gets alone."""
    from circuits import attribute

    frozen, graph = graph_of(5, "local")
    nodes = {}
    for node in graph.nodes:
        if node.kind == "head":
            mask = nodes.setdefault(node.layer, torch.zeros(5, frozen.model.cfg.E, dtype=torch.float64))
            mask[node.position, node.index] = 1
    for i, node in enumerate(graph.nodes):
        if node.kind not in ("feature", "head"):
            continue
        target = (
            Channel(node.layer, node.index, node.position)
            if node.kind == "head"
            else Feature(frozen.coded[node.layer].coder, node.index, node.position)
        )
        found = attribute(frozen, targets=target, nodes=nodes)
        for j, source in enumerate(graph.nodes):
            if source.kind == "embed":
                expected = found.embeddings[0, source.position]
            elif source.kind == "error":
                expected = found.errors[source.layer][0, source.position]
            else:
                continue
            assert torch.allclose(graph.weights[i, j], expected, atol=1e-12)


def all_paths(graph: Graph, start: int) -> list[tuple[tuple[int, ...], float]]:
    """Every path from a node to where paths end, with the signed product of edges by values."""
    found = []

    def walk(path: tuple[int, ...], weight: float) -> None:
        node = graph.nodes[path[-1]]
        if node.kind not in ("target", "feature", "head"):
            found.append((path, weight))
            return
        for j in graph.weights[path[-1]].nonzero()[:, 0].tolist():
            edge = float(graph.weights[path[-1], j])
            walk((*path, j), edge if len(path) == 1 else weight * edge / node.value)

    walk((start,), 1.0)
    return found


def test_total_effects_are_sums_over_all_ways_down():
    _, graph = graph_of(5, "local", max_features=6, max_heads=4)

    def through(i: int, j: int) -> float:
        """What reaches i from j for a unit of i: over every way between them."""
        if i == j:
            return 1.0
        node = graph.nodes[i]
        if node.kind not in ("target", "feature", "head"):
            return 0.0
        size = node.activation if node.kind == "feature" else node.value
        return sum(float(graph.weights[i, k]) / size * through(k, j) for k in graph.weights[i].nonzero()[:, 0].tolist())

    for target in (0, 1):
        found = total_effects(graph, target)
        value = graph.nodes[target].value
        for j, node in enumerate(graph.nodes):
            expected = 0.0 if node.kind == "target" and j != target else value * through(target, j)
            assert abs(float(found[j]) - expected) < 1e-9 * (1 + abs(expected))
    with pytest.raises(IndexError, match="target 2 is out of range: this graph has 2"):
        total_effects(graph, 2)
    tie = replace(graph, nodes=(replace(graph.nodes[0], value=0.0), *graph.nodes[1:]))
    assert torch.allclose(total_effects(tie)[1:], total_effects(graph)[1:])
    assert total_effects(tie)[0] == 0


def test_paths_are_the_largest_of_all():
    _, graph = graph_of(5, "local", max_features=6, max_heads=4)
    every = sorted(all_paths(graph, 0), key=lambda item: -abs(item[1]))
    found = top_paths(graph, k=15)
    assert len(found) == 15
    for path, (_, weight) in zip(found, every, strict=False):
        assert abs(abs(path.weight) - abs(weight)) < 1e-9
    assert abs(found.remainder - (graph.nodes[0].value - sum(p.weight for p in found))) < 1e-12
    everything = top_paths(graph, k=10 * len(every))
    # All paths, and what the remainders of features that are no nodes send down, make up the target.
    shares = torch.where(graph.where("feature", "head"), 1 / graph.values(), 0)
    passing = graph.weights * shares
    lost = torch.linalg.solve(torch.eye(len(graph), dtype=torch.float64) - passing, graph.remainder)
    assert abs(everything.remainder - float(lost[0])) < 1e-8
    best = greedy_path(graph)
    largest = graph.weights[0].abs().argmax()
    assert best.nodes[1] == graph.nodes[int(largest)]


def test_paths_are_printed_as_people_know_them():
    nodes = (
        Node("target", 2, 4, 0, 2.0, name="logit 'x'@-1"), Node("feature", 1, 4, 3498, 1.0, 1.0),
        Node("head", 0, 3, 920, 0.5), Node("embed", -1, 3, value=1.0),
    )  # fmt: skip
    weights = torch.zeros(4, 4)
    weights[0, 1], weights[1, 2], weights[2, 3] = 0.7, 0.22, 1.5
    graph = Graph(nodes, weights, torch.zeros(4), ("a", "b", "c", "d", "e"), torch.tensor([1.0, 0, 0, 0]))
    expected = "logit 'x'@-1 -> block1[3498]@4: 0.7 -> mixer0[920]@3: 0.22 -> embed0@3: 1.5"
    assert str(greedy_path(graph)) == expected
    assert abs(greedy_path(graph).weight - 0.7 * 0.22 * 1.5 / 0.5) < 1e-6


def test_influence_against_enumerated_paths():
    _, graph = graph_of(1, "block", max_features=5)
    total = graph.weights.abs().sum(1) + graph.remainder.abs()
    shares = graph.weights.abs() / total.clamp_min(1e-300).unsqueeze(1)
    expected = torch.zeros(len(graph), dtype=torch.float64)
    for start in range(2):
        expected[start] += graph.importance[start]

        def walk(i: int, weight: float) -> None:
            for j in shares[i].nonzero()[:, 0].tolist():
                expected[j] += weight * float(shares[i, j])
                walk(j, weight * float(shares[i, j]))

        walk(start, float(graph.importance[start]))
    assert torch.allclose(influence(graph), expected, atol=1e-10)
    assert torch.allclose(edge_influence(graph).sum(0), expected - graph.importance, atol=1e-10)


@pytest.mark.parametrize(("nodes", "edges"), list(itertools.product([0.5, 0.8, 1.0], [0.6, 0.98])))
def test_pruning(nodes, edges):
    _, graph = graph_of(8, "local")
    pruned = prune(graph, nodes, edges)
    assert len(pruned.graph) == int(pruned.nodes.sum())
    assert pruned.graph.residual().abs().max() < 1e-10  # what went is in the remainder
    assert pruned.nodes[graph.where("target", "embed")].all()
    inner = pruned.graph.where("feature", "head")
    assert (pruned.graph.weights != 0).any(0)[inner].all()
    assert (pruned.graph.weights != 0).any(1)[inner].all()
    before, after = scores(graph), scores(pruned.graph)
    assert 0 <= after.replacement <= before.replacement + 1e-9 <= 1 + 2e-9
    assert set(pruned.graph.nodes) <= set(graph.nodes)


def test_pruning_nothing_keeps_every_edge():
    _, graph = graph_of(8, "block")
    pruned = prune(graph, 1.0, 1.0)
    kept = graph.weights[pruned.nodes][:, pruned.nodes]
    assert torch.equal(pruned.graph.weights, kept)


def test_scores_of_known_graphs():
    nodes = (Node("target", 1, 0, name="t"), Node("embed", -1, 0, value=1.0), Node("error", 0, 0, value=1.0))
    weights = torch.zeros(3, 3)
    weights[0, 1], weights[0, 2] = 3.0, -1.0
    graph = Graph(nodes, weights, torch.zeros(3), ("a",), torch.tensor([1.0, 0, 0]))
    assert scores(graph) == pytest.approx((0.75, 0.75))
    rest = Graph(nodes, weights, torch.tensor([4.0, 0, 0]), ("a",), torch.tensor([1.0, 0, 0]))
    assert scores(rest) == pytest.approx((0.375, 0.375))


def test_errors_say_what_is_wrong(unchecked):
    frozen, graph = graph_of(1, "block")
    with pytest.raises(ValueError, match="nodes must be above 0"):
        prune(graph, nodes=0)
    with pytest.raises(KeyError, match="no node"):
        graph.find(("feature", 9, 9, 9))
    with pytest.raises(IndexError, match="target 2 is out of range: this graph has 2"):
        top_paths(graph, target=2)
    with pytest.raises(ValueError, match="importance must be 1 numbers"):
        build_graph(frozen, Logit(3), importance=[0.5, 0.5])
    wide = FrozenModel(frozen.model, random_tokens(1, 2, 5))
    with pytest.raises(ValueError, match="a graph is of one prompt, this run has 2"):
        build_graph(wide, Logit(3))
    cycle = Graph(graph.nodes, torch.ones_like(graph.weights), graph.remainder, graph.tokens, graph.importance)
    with pytest.raises(ValueError, match="cycle"):
        influence(cycle)
    with pytest.raises(ValueError, match="weights is"):
        Graph(graph.nodes, graph.weights[1:], graph.remainder, graph.tokens, graph.importance)
    with pytest.raises(IndexError, match="supernode 'x'"):
        graph.with_supernode("x", [999])
