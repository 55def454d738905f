"""Planted dictionaries: sparse sums of known atoms, so that a coder's latents can be compared with the truth.

    x = sum_i a_i m_i atom_i          a_i 0 or 1, m_i uniform on [0.5, 1.5], atoms on the unit sphere

Scenarios differ in which atoms are active together, and how often. In all of them about `l0` are active on average:

    uniform      every atom equally often, independently
    zipf         the i-th atom with a probability in proportion to 1 / i
    correlated   atoms come in pairs: where the first is active, so is the second in half of the cases, and else never
                 more often than makes both equally frequent
    families     every parent has three children, of which one at a time is active, only where the parent is, then
                 mostly
    rare         every other atom is twenty times rarer than its neighbours
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mamba.names_elsewhere import SAE_LENS, import_advice
from saes.saelens_names import SYNTHETIC

Scenario = Literal["uniform", "zipf", "correlated", "families", "rare"]

SCENARIOS: tuple[Scenario, ...] = ("uniform", "zipf", "correlated", "families", "rare")

TOGETHER = 0.5
"""correlated: how often the second of a pair is active where the first is."""

CHILDREN = 3
HAS_CHILD = 0.75
"""families: children of a parent, and how often an active parent has an active child."""

RARER = 20.0
"""rare: how many times rarer every other atom is."""

MOST = 0.5
"""No atom is active more often than this."""


@dataclass(frozen=True)
class PlantedDictionary:
    """Atoms, and how often each is active. Made by :func:`plant`."""

    scenario: Scenario
    atoms: Float[Tensor, "A d"]
    frequency: Float[Tensor, " A"]
    """Probability that each atom is active."""

    def active(self, n: int, generator: torch.Generator) -> Bool[Tensor, "n A"]:
        """Which atoms are active in n examples."""
        A = len(self.atoms)
        u = torch.rand(n, A, generator=generator)
        if self.scenario == "correlated":
            first = u[:, 0::2] < self.frequency[0::2]
            p = self.frequency[1::2]
            alone = p * (1 - TOGETHER) / (1 - p)
            second = u[:, 1::2] < torch.where(first, TOGETHER, alone)
            return torch.stack([first, second], 2).flatten(1)[:, :A]
        if self.scenario == "families":
            group = 1 + CHILDREN
            parents = u[:, 0::group] < self.frequency[0::group]
            which = (u[:, 1::group] / HAS_CHILD * CHILDREN).floor()  # CHILDREN or more: none
            child = parents.unsqueeze(2) & (which.unsqueeze(2) == torch.arange(CHILDREN))
            return torch.cat([parents.unsqueeze(2), child], 2).flatten(1)
        return u < self.frequency

    def sample(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n A"]]:
        """n examples, and the coefficient of each atom in them."""
        active = self.active(n, generator)
        amounts = active * (0.5 + torch.rand(active.shape, generator=generator))
        return amounts @ self.atoms, amounts


def plant(scenario: Scenario, *, d: int, atoms: int, l0: float | int, seed: int) -> PlantedDictionary:
    """A dictionary of `atoms` random directions in d dimensions, about `l0` of them active in each example.

    Raises
    ------
    ValueError
        An unknown scenario; atoms that do not fill pairs or families; an `l0` that no frequencies reach.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {scenario!r}")
    group = {"correlated": 2, "families": 1 + CHILDREN, "rare": 2}.get(scenario, 1)
    if atoms % group:
        raise ValueError(f"{scenario} needs a multiple of {group} atoms, got {atoms}")
    if not 0 < l0 <= MOST * atoms / group:
        raise ValueError(f"l0 must be positive and at most {MOST * atoms / group:g} with {atoms} atoms, got {l0}")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(atoms, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    weight = torch.ones(atoms)
    if scenario == "zipf":
        weight = 1 / torch.arange(1, atoms + 1)
    elif scenario == "families":
        weight[torch.arange(atoms) % group != 0] = HAS_CHILD / CHILDREN
    elif scenario == "rare":
        weight[1::2] = 1 / RARER
    return PlantedDictionary(scenario, directions, _frequencies(weight, l0))


def _frequencies(weight: Tensor, l0: float | int) -> Tensor:
    """In proportion to the weights, none above MOST, with sum l0."""
    low, high = 0.0, l0 / float(weight.min())
    for _ in range(100):
        scale = (low + high) / 2
        if float((weight * scale).clamp(max=MOST).sum()) < l0:
            low = scale
        else:
            high = scale
    return (weight * high).clamp(max=MOST)


__getattr__ = import_advice(__name__, SYNTHETIC, library=SAE_LENS)
