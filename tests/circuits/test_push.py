"""Edges of graphs, pulled back, against changes pushed forward on the frozen model."""

from __future__ import annotations

import pytest
import torch

from circuits import Direction, FrozenModel, Logit, build_graph
from circuits.push import frozen_changes
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for
from tests.kinds import MAMBA


@pytest.mark.parametrize("target", [None, "block", "local"])
@pytest.mark.parametrize("family", MAMBA)
def test_a_removed_node_changes_what_its_edges_say(family, target):
    model = random_model(4, family, n_layers=3)
    coders = [] if target is None else coders_for(model, target, skip=True)
    frozen = FrozenModel(model, random_tokens(4, 1, 5), coders[1:])  # layer 0 stays a mixer
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [Logit(3), Logit(5, 3, minus=2), Direction(vector, 2, 4), Direction(vector, 0, 4, "out")]
    graph = build_graph(frozen, targets, max_features=10, max_heads=12)
    nodes = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "error", "feature", "head")]
    changes = frozen_changes(frozen, graph, targets, nodes)
    assert len(nodes) > 10
    assert torch.allclose(changes, -graph.weights[:, nodes].t(), atol=1e-10)


def test_what_cannot_be_taken_away():
    model = random_model(4, n_layers=2)
    frozen = FrozenModel(model, random_tokens(4, 1, 5))
    graph = build_graph(frozen, Logit(3))
    with pytest.raises(ValueError, match="cannot be taken away"):
        frozen_changes(frozen, graph, Logit(3), [0])
