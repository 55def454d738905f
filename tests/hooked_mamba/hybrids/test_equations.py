"""Every family against its equations in float64: the logits and every site."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.hooked_mamba.hybrids import reference
from tests.hooked_mamba.hybrids.tiny import CASES, Tiny, tiny, tokens_for
from tests.hooked_mamba.tiny import relative

FP64 = 1e-12


def everything(model, tokens: Tensor, **kwargs):
    return model.run_with_cache(tokens, names_filter=lambda name: True, **kwargs)


def error(got: Tensor, expected: np.ndarray) -> float:
    """As `relative`; -inf must stand in the same places."""
    hidden = np.isneginf(expected)
    assert (np.isneginf(got.numpy()) == hidden).all()
    return relative(got.masked_fill(torch.from_numpy(hidden), 0), np.where(hidden, 0, expected))


def check_sites(one: Tiny, tokens: Tensor, limit: float = FP64) -> None:
    expected = reference.forward(one.config, one.weights, tokens.numpy())
    logits, cache = everything(one.model, tokens)
    assert relative(logits, expected.logits) < limit
    assert list(cache) == [n for n in one.model.hook_dict if n in expected.values]
    assert set(cache) == set(expected.values) == set(one.model.hook_dict)
    worst = max((error(value, expected.values[name]), name) for name, value in cache.items())
    assert worst < (limit, ""), f"{worst[1]} is off by {worst[0]:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_every_site_equals_the_equations(case):
    check_sites(tiny(case), tokens_for())


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_declared(case):
    model = tiny(case).model
    _, cache = everything(model, tokens_for(length=5))
    for name, value in cache.items():
        assert tuple(value.shape) == model.site(name).shape(2, 5), name
