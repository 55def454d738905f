"""What holds for every test."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import annotations

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


@pytest.fixture(autouse=True)
def annotations_are_checked(pytestconfig: pytest.Config) -> None:
    """At the first calls of every function in every test; at all calls in `make test-all`."""
    annotations.anew(math.inf if pytestconfig.getoption("hypothesis_profile", None) == "many" else annotations.CALLS)


@pytest.fixture
def every_call_checked(annotations_are_checked: None) -> None:
    """For tests of the annotations."""
    annotations.anew(math.inf)
