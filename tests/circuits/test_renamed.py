"""Old names work for one release and say what the new one is."""

from __future__ import annotations

import importlib

import pytest
import torch

from circuits import FrozenModel
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for

RENAMED = {
    "circuits.Head": "circuits.targets.Channel",
    "circuits.targets.Head": "circuits.targets.Channel",
    "circuits.interventions.Edit": "circuits.interventions.Intervention",
    "circuits.selection.patch_effects": "circuits.patch_effects.patch_effects",
    "circuits.published.OptionedModel": "circuits.published.optioned",
    "hooked_mamba.analysis.rank_one_edit.Edit": "hooked_mamba.analysis.rank_one_edit.RankOneEdit",
    "hooked_mamba.scan_view.ScanView": "hooked_mamba.frozen.selective.SelectiveScan",
    "hooked_mamba.token_sources.TokenPath": "hooked_mamba.frozen.tokens.TokenPath",
}


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_are_the_new_ones(old):
    module, _, name = old.rpartition(".")
    home, _, new = RENAMED[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{name} is now {RENAMED[old]}"):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(home), new)


def test_the_old_mode(unchecked):
    model, tokens = random_model(4, "mamba"), random_tokens(4)
    with pytest.warns(DeprecationWarning, match="mode 'hybrid' is now mode 'split'"):
        frozen = FrozenModel(model, tokens, coders_for(model, "local"), mode="hybrid")
    assert {coded.mode for coded in frozen.coded.values()} == {"split"}


def test_functions_of_a_scan_are_its_methods():
    from hooked_mamba.scan_view import hidden_attention, mean_hidden_attention, run_scan

    view = FrozenModel(random_model(4, "mamba"), random_tokens(4)).cache.scan_view(0)
    for call, new in (
        (lambda: hidden_attention(view, [2]), view.rows([2])),
        (lambda: mean_hidden_attention(view), view.mean_rows()),
        (lambda: run_scan(view), view.out().y),
    ):
        with pytest.warns(DeprecationWarning, match="is now view"):
            assert torch.equal(call(), new)


def test_a_function_named_like_its_module_stays_one():
    for name in ("faithfulness", "patch_effects"):
        importlib.import_module(f"circuits.{name}")
        assert callable(getattr(importlib.import_module("circuits"), name))
