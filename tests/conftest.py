"""What holds for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def gradients_stay_switched_on():
    """A test, or what it calls, that switches gradients off for good would break those behind it."""
    yield
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "gradients were switched off for the whole process: use torch.no_grad()"
