"""Everything in circuits where the model is on another device than the CPU, with the numbers that the CPU gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits import (
    CutHead,
    CutTokens,
    FrozenModel,
    Logit,
    ScaleEmbedding,
    ScaleError,
    ScaleFeature,
    ScaleState,
    SetState,
    attribute,
    build_graph,
    extract_circuit,
    frozen_effects,
    integrated_gradients,
    intervened,
    node_effects,
    patch_effects,
    trace_paths,
)
from tests.circuits.elsewhere import Elsewhere, another_device, moved
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for
from tests.circuits.writes import writer
from tests.kinds import MAMBA

pytestmark = pytest.mark.usefixtures("fast")
TARGET = Logit(3, minus=2)
EDITS = [
    ScaleEmbedding([0, 2], 0.5), CutHead(1, [1, 2], 2), CutTokens(2, [3, 4], 0), ScaleState(0, 3), SetState(1, 2, 0.4),
]  # fmt: skip


PRESETS = {None: "mambacoder", "block": "mambacoder", "local": "mambacoder"}


def writers(model):
    return [writer(model, layer, seed=layer) for layer in range(2)]


def everything(family, coded, elsewhere):
    """Numbers of each kind, by name."""
    model, tokens, others = random_model(5, family, n_layers=2), random_tokens(5, 1, 5), random_tokens(6, 3, 5)
    coders = [] if coded is None else coders_for(model, coded, skip=True) if coded != "write" else writers(model)
    if elsewhere:
        model, tokens, others, coders = moved(model), Elsewhere(tokens), Elsewhere(others), [*map(moved, coders)]
    edits = EDITS if coded is None else [ScaleFeature(coders[0], 2, factor=2.0), ScaleError(coders[1], 1)]
    frozen, reference = (FrozenModel(model, ids, coders) for ids in (tokens, others))
    graph = build_graph(frozen, TARGET, max_features=5, max_heads=5)
    circuit = extract_circuit(model, coders, tokens, TARGET, 6, choose="integrated", reference=reference)
    found = {
        "graph": graph.weights.sum(0),
        "circuit": circuit.graph.weights.sum(0),
        "report": [circuit.report.recovery.circuit, circuit.report.recovery.gradient, *circuit.report.recovery.random],
        "edges": [min(circuit.report.edges, 1e-9)],
        "attribution": attribute(frozen, targets=TARGET).embeddings,
        "integrated": integrated_gradients(frozen, targets=TARGET, steps=2).embeddings,
        "patching": patch_effects(frozen, target=TARGET, replace_by=4).forward.selection,
        "paths": [path.weight for path in trace_paths(frozen, TARGET).paths[1]],
        "published": [path.weight for path in trace_paths(frozen, TARGET, preset=PRESETS.get(coded)).paths[0]],
        "effects": frozen_effects(frozen, edits, TARGET),
        "nodes": node_effects(frozen, lambda logits: logits[:, -1, 3], steps=2).heads.get(0, tokens),
    }
    with torch.no_grad(), intervened(model, edits):
        found["edited"] = model(tokens)
        found["made"] = model.generate(tokens, 2, do_sample=False, stop_at_eos=False, verbose=False)
    if coded is None:
        for selection in ("half", "shares", "gradient"):
            other = FrozenModel(model, tokens, selection=selection)
            found[selection] = attribute(other, targets=TARGET).embeddings
    return found


def check(family, coded):
    expected = everything(family, coded, elsewhere=False)
    with another_device():
        found = everything(family, coded, elsewhere=True)
        numbers = {
            name: value.cpu() if isinstance(value, Tensor) else torch.tensor(value) for name, value in found.items()
        }
    for name, value in expected.items():
        number = numbers[name].held if isinstance(numbers[name], Elsewhere) else numbers[name]
        assert torch.allclose(number, torch.as_tensor(value), atol=1e-9), name
    assert isinstance(found["attribution"], Elsewhere)  # it was there indeed


@pytest.mark.parametrize(("family", "coded"), [("mamba", None), ("mamba2", "local")])
def test_numbers_are_those_of_the_cpu(family, coded):
    check(family, coded)


@pytest.mark.slow
@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("coded", [None, "block", "local", "write"])
def test_numbers_are_those_of_the_cpu_in_all_modes(family, coded):
    check(family, coded)


def test_a_tensor_made_in_the_wrong_place_is_seen():
    with another_device():
        there = Elsewhere(torch.ones(3))
        assert isinstance(there + 1, Elsewhere)
        assert isinstance(torch.zeros(3, device=there.device), Elsewhere)
        assert type(there.cpu()) is Tensor
        with pytest.raises(RuntimeError, match="aten::add is given tensors of two devices"):
            there + torch.ones(3)
