"""A key found by attention, a value carried by the state: graphs name both, by units and by write dictionaries."""

from __future__ import annotations

import pytest
import torch

from circuits import FrozenModel, Logit, attribute, build_graph, edit_of, intervened, top_paths
from tests.circuits.recall_models import Recall, cases, dictionaries, recall


def check(model, case: Recall) -> None:
    target = Logit(case.answer, minus=case.other)
    by_units = FrozenModel(model, case.tokens)
    assert int(by_units.logits[0, -1].argmax()) == case.answer, "the model does not do its task"
    by_features = FrozenModel(model, case.tokens, dictionaries(model))
    assert set(by_features.coded) == {0, "1.attn"}
    found = attribute(by_units, targets=target)
    assert found.residual.abs().max() < 1e-10
    assert int(found.embeddings[0].argmax()) == case.value_at
    units = ("head", "1.attn", case.key_at, 0), ("head", 0, case.value_at, case.answer)
    features = ("feature", "1.attn", case.key_at, case.answer), ("feature", 0, case.value_at, case.answer)
    for frozen, (found_by, carried_by) in ((by_units, units), (by_features, features)):
        graph = build_graph(frozen, target, max_heads=20, max_features=20)
        assert float(graph.residual().abs().max()) < 1e-10
        (best,) = top_paths(graph, k=1)
        assert [node.key for node in best.nodes[1:]] == [found_by, carried_by, ("embed", -1, case.value_at, 0)]
        assert best.weight > 0.9 * best.edges[0]
        # Taken away in the real model, either takes the logit with it; the last norm makes what is left larger.
        for key in (found_by, carried_by):
            with torch.no_grad(), intervened(model, edit_of(frozen, graph.nodes[graph.find(key)])):
                logits = model(case.tokens)[0, -1]
            assert float(logits[case.answer]) < 0.5 * float(by_units.logits[0, -1, case.answer])


def test_key_and_value():
    for seed in range(2):
        model = recall(seed)
        for case in cases(4, seed):
            check(model, case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_key_and_value_in_many_models(seed):
    model = recall(seed)
    for case in cases(10, seed):
        check(model, case)
