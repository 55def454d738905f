"""Circuits of many prompts are those of each, whoever extracts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from circuits import extract_circuit
from circuits.many import REPORT, extract_many, load_many
from hooked_mamba.pieces import PiecesError, save_tensors
from tests.circuits.models import random_model


def test_each_prompt_has_its_own_circuit(tmp_path: Path) -> None:
    model = random_model(2, "mamba", n_layers=2)
    prompts = [torch.tensor([[1, 4, 2, 9]]), torch.tensor([[3, 3, 8, 1, 5]])]
    options = {"budget": 6, "check": True}
    found = extract_many(model, (), prompts, lambda i: 4 + i, tmp_path, progress=False, **options)
    for i, one in enumerate(found):
        circuit = extract_circuit(model, (), prompts[i], 4 + i, **options)
        assert one.graph.nodes == circuit.graph.nodes
        assert torch.equal(one.graph.weights, circuit.graph.weights)
        assert list(one.report) == list(REPORT)
        assert one.report["circuit"] == circuit.report.recovery.circuit
    again = list(load_many(tmp_path))
    assert [one.graph.nodes for one in again] == [one.graph.nodes for one in found]
    with pytest.raises(PiecesError, match="its targets is"):
        extract_many(model, (), prompts, 4, tmp_path, progress=False, **options)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PiecesError, match=re.escape("work.json is missing")):
        list(load_many(tmp_path))
    save_tensors(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds no circuits: a piece lacks about"):
        list(load_many(tmp_path))
