"""Random configs of every family against the equations, in pieces, padded and edited."""

from __future__ import annotations

import random

import pytest
import torch

from tests.hooked_mamba.hybrids.random_configs import drawn
from tests.hooked_mamba.hybrids.test_edits import check_edit
from tests.hooked_mamba.hybrids.test_equations import check_sites
from tests.hooked_mamba.hybrids.test_state import check_padding, check_pieces
from tests.hooked_mamba.hybrids.tiny import tokens_for

pytestmark = pytest.mark.usefixtures("fast")
LENGTH = 7
DEFAULT = (2, 3, 5, 7)
"""Seeds of the default run: a Granite, a Nemotron-H, an LFM2 and a Zamba2."""


def any_of_each_kind(draw: random.Random, names: list[str]) -> list[str]:
    """Each site of the stack, and of the sites of one name in several blocks one."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split(".", 2)[2] if name.startswith("blocks.") else name, []).append(name)
    return [draw.choice(same) for same in kinds.values()]


@torch.no_grad()
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed in DEFAULT else [pytest.mark.slow]) for seed in range(200)]
)
def test_a_random_config(seed):
    one, draw = drawn(seed), random.Random(seed)
    check_sites(one, tokens_for(length=LENGTH, seed=seed))
    cuts = sorted(draw.sample(range(1, LENGTH), draw.randint(1, 3)))
    for ends in ((0, *cuts, LENGTH), tuple(range(LENGTH + 1))):
        check_pieces(one.model, tokens_for(length=LENGTH, seed=seed), ends)
    for side in ("left", "right"):
        check_padding(one.model, side, (LENGTH, draw.randint(2, LENGTH - 1), 1))
    tokens = tokens_for(length=4, seed=seed + 1)
    for name in any_of_each_kind(draw, list(one.model.hook_dict)):
        check_edit(one, name, None, tokens)  # where all experts are chosen, others in their place are the same
