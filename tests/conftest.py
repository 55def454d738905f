"""What holds for every test."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers share the cores, and small tensors gain nothing from threads. The variable is for processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same cases in every run and on every machine: few in `make test`, many in `make test-all`.
settings.register_profile("default", max_examples=10, derandomize=True, database=None, deadline=None)
settings.register_profile(
    "many", settings.get_profile("default"), max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def gradients_stay_switched_on():
    """A test, or what it calls, that switches gradients off for good would break those behind it."""
    yield
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "gradients were switched off for the whole process: use torch.no_grad()"
