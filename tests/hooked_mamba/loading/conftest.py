"""Folders that files of other formats are converted from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a name of CASES, saved once."""
    from tests.hooked_mamba.loading.families import CASES  # not above: types are checked from pytest's start on

    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            place = tmp_path_factory.mktemp(case)
            CASES[case]().save_pretrained(place)
            made[case] = place
        return made[case]

    return folder
