"""Circuits of RWKV-7, gated DeltaNet and Mamba-3: graphs, paths, patches, cuts and coders."""

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
    patch_effects,
    trace_paths,
)
from circuits.interventions import CutHead, frozen_effects, intervened
from circuits.push import frozen_changes
from saes import SparseCoder, mambacoder_config
from saes.targets import local_part
from tests.hooked_mamba.recurrent.models import KINDS, MAMBA3, bare, tokens_for

EXACT = 1e-10
FEW = ("rwkv7", "mamba3-mimo")
EACH = [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FEW)) for kind in (*KINDS, *MAMBA3)]
each_kind = pytest.mark.parametrize("kind", EACH)


def prompt(kind):
    return bare(kind), tokens_for(1, 4)


@each_kind
def test_graphs_and_paths_sum(kind):
    """Rows of a graph are the nodes' own values; taking a node away changes the target by its edge; all paths sum."""
    model, tokens = prompt(kind)
    frozen = FrozenModel(model, tokens)
    graph = build_graph(frozen, [Logit(3)], max_heads=4)
    assert float(graph.residual().abs().max()) < EXACT
    ends = [i for i, node in enumerate(graph.nodes) if node.kind in ("embed", "head")]
    assert torch.allclose(frozen_changes(frozen, graph, Logit(3), ends), -graph.weights[:, ends].t(), atol=EXACT)
    paths = trace_paths(frozen, Logit(3), k=10**6, length=3).paths
    ended = [path for some in paths for path in some if path.nodes[-1].kind != "head"]
    assert abs(sum(path.weight for path in ended) - float(attribute(frozen, targets=Logit(3)).target)) < EXACT


@each_kind
def test_patches_nodes_and_circuits(kind):
    model, tokens = prompt(kind)
    frozen = FrozenModel(model, tokens)
    assert patch_effects(frozen, target=3, replace_by=[2, 5]).residual.abs().max() < EXACT
    # A cut leaves RWKV-7's bonus, which nothing at the last position reads of position 1.
    head = frozen_effects(frozen, CutHead(1, 1, 0), Logit(3))
    assert torch.allclose(head[0], -attribute(frozen, targets=Logit(3)).heads[1][:, 1, 0], atol=EXACT)
    with torch.no_grad(), intervened(model, [CutHead(1, 1, [0, 1])]):
        assert not torch.allclose(model(tokens), frozen.logits)
    circuit = extract_circuit(model, [], tokens, Logit(3), budget=10)
    assert circuit.report is not None
    assert circuit.report.edges < EXACT


@each_kind
def test_sums_with_coders(kind):
    """A coder of what the mixer adds, or of the part that a position's own input gives."""
    model, tokens = prompt(kind)
    d = model.cfg.d_model
    targets = [Logit(3), Channel(1, 2, 3), Direction(torch.ones(d, dtype=torch.float64), 0, -1, stream="out")]
    for target in ("block", "local"):
        coders = []
        for layer in range(2):
            config = mambacoder_config(layer, d, 24, k=3, target=target)
            coders.append(SparseCoder(config, seed=layer).double())
        assert attribute(model, coders, tokens, targets).residual.abs().max() < EXACT
    assert local_part(model, 1, model.run_with_cache(tokens)[1]).shape == (1, 4, d)
