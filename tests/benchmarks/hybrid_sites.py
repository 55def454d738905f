"""How many distinct tensors a cache of a hybrid holds, and in which part of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PARTS = ("mixer", "attention", "MLP and experts", "stream and norms")
OF_KIND = {"mixer": "mixer", "attn": "attention", "mlp": "MLP and experts", "moe": "MLP and experts"}
MODULES = {"attn": "attn", "moe": "moe", "mlp": "mlp", "shared_mlp": "mlp", "mixer": "mixer", "mamba": "mixer"}
MODULES |= {"conv": "mixer"}
"""Second part of a site's name, theirs and ours -> what it stands for where the block has that."""


def seen(cache: Mapping[str, Any], kinds: Sequence[Sequence[str]]) -> dict[str, int]:
    """Distinct tensors by part.

    Parameters
    ----------
    cache
        Site -> value.
    kinds
        The branches of each block.
    """
    found: dict[str, set[tuple[Any, ...]]] = {part: set() for part in PARTS}
    done: set[tuple[Any, ...]] = set()
    for inner in (True, False):  # what stands inside a branch counts there, also if the stream holds the same
        for name, value in cache.items():
            part = part_of(name, kinds)
            if isinstance(value, Tensor) and (part != PARTS[-1]) == inner and (key := content(value)) not in done:
                done.add(key)
                found[part].add(key)
    return {part: len(keys) for part, keys in found.items()}


def part_of(name: str, kinds: Sequence[Sequence[str]]) -> str:
    """The part that a site belongs to."""
    match = re.match(r"blocks\.(\d+)\.(\w+)\.", name)
    if not match or match[2] not in MODULES:
        return PARTS[-1]
    branch, here = MODULES[match[2]], kinds[int(match[1])]
    return OF_KIND[branch if branch in here else here[0]]


def content(value: Tensor) -> tuple[Any, ...]:
    """What two tensors share if they are the same but for a leading batch of one and how axes are joined."""
    flat = value.detach().reshape(-1)
    numbers = torch.nan_to_num(flat.double(), neginf=-1e30)
    weights = torch.linspace(1, 2, len(flat), dtype=torch.float64)
    return len(flat), value.dtype, f"{float(numbers @ weights):.6e}", f"{float(numbers.abs().sum()):.6e}"
