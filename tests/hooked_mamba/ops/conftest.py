"""One thread: small tensors gain nothing from more, and waiting for each other costs much on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

OF_NUMBA = ["delta_scan", "dispatch", "elementwise", "memory", "numba", "products"]
"""Files that are about numba, or about which backend is taken where it is there."""

collect_ignore = [] if find_spec("numba") else [f"test_{name}.py" for name in OF_NUMBA]


def pytest_report_header() -> str | None:
    return f"no numba: left out are test_{', test_'.join(OF_NUMBA)} of ops" if collect_ignore else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if collect_ignore and "numba" in item.name:
            item.add_marker(pytest.mark.skip(reason="needs numba"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
