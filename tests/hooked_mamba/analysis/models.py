"""Tiny models and runs that the analysis tests share."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import ActivationCache
from tests.hooked_mamba.tiny import FAMILIES, build, tokens_for

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""How closely a decomposition sums, as a part of the largest magnitude."""

every_family = pytest.mark.parametrize("family", FAMILIES)
two_families = pytest.mark.parametrize("family", ["mamba", "mamba2-groups"])
plain_and_padded = pytest.mark.parametrize(
    ("dtype", "padded"), [(torch.float32, False), (torch.float64, True)], ids=["fp32", "fp64-padded"]
)

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
"""One full row, one padded on the left, one on the right."""


def model_for(family: str, dtype: torch.dtype = torch.float64, **changes):
    """A tiny model with every weight away from 0 and 1."""
    model = build(family, **changes).to(dtype)
    return model.requires_grad_(False)


def run(family: str, dtype: torch.dtype = torch.float64, padded: bool = False, **changes):
    """(model, tokens, logits, cache) of three rows of seven tokens."""
    model = model_for(family, dtype, **changes)
    tokens = tokens_for(model, rows=3)
    logits, cache = model.run_with_cache(tokens, attention_mask=MASK if padded else None)
    assert isinstance(cache, ActivationCache)
    return model, tokens, logits, cache
