"""The sizes at which benchmarks run: as the claims are made, quickly, and just to see that nothing is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, int]
"""Batch and positions."""


class GraphSizes(NamedTuple):
    """Positions, latents of a coder and how many are active, features and heads of a graph; positions of a sweep."""

    length: int
    d_sae: int
    k: int
    features: int
    heads: int
    sweep_length: int


@dataclass(frozen=True)
class Sizes:
    """Shapes and patience of one run."""

    name: str
    shapes: tuple[Shape, ...]
    """Of the scans' forward."""
    grad_shape: Shape
    """Of what runs backward, and of whole models."""
    long_shape: Shape
    """Of memory and of states by position."""
    E: int
    N: int
    heads: tuple[int, int, int]
    """Mamba-2's H, P, N."""
    delta_heads: tuple[tuple[int, int], tuple[int, int]]
    """H and K = V of RWKV-7 and of gated DeltaNet."""
    d_model: int
    n_layers: int
    d_vocab: int
    new_tokens: int
    analysis: tuple[Shape, ...]
    """Width d and positions of the layer that is analysed."""
    sweep: tuple[int, int, int]
    """Width d, layers and positions of a sweep of patches."""
    attention_shape: Shape
    """Of mean hidden attention in a model of full size."""
    attribution_length: int
    """Positions of the prompt that is attributed in a model of full size."""
    graphs: GraphSizes
    """Of graphs and of a sweep in a model of full size."""
    seconds: float
    """Patience for one comparison, beyond the least number of rounds."""
    rounds: tuple[int, int]
    """Least and most rounds of a comparison."""
    claims: bool = False
    """Whether the project's bounds are stated for these sizes."""
    fresh_process: bool = True
    """Whether memory and first calls are measured in processes of their own."""
    compiled: bool = True
    """Whether backends that compile at their first call take part."""


FULL = Sizes(
    name="full",
    shapes=((1, 64), (1, 256), (1, 1024), (8, 256)),
    grad_shape=(1, 256),
    long_shape=(1, 1024),
    E=1536,
    N=16,
    heads=(24, 64, 128),
    delta_heads=((12, 64), (16, 128)),
    d_model=768,
    n_layers=24,
    d_vocab=50280,
    new_tokens=32,
    analysis=((768, 64), (192, 256)),
    sweep=(128, 4, 32),
    attention_shape=(1, 2048),
    attribution_length=512,
    graphs=GraphSizes(64, 16384, 32, 512, 128, 32),
    seconds=20,
    rounds=(5, 15),
    claims=True,
)

QUICK = Sizes(
    name="quick",
    shapes=((1, 64), (1, 256)),
    grad_shape=(1, 128),
    long_shape=(1, 256),
    E=512,
    N=16,
    heads=(8, 64, 64),
    delta_heads=((4, 64), (4, 64)),
    d_model=256,
    n_layers=4,
    d_vocab=4096,
    new_tokens=8,
    analysis=((256, 64), (64, 128)),
    sweep=(64, 2, 16),
    attention_shape=(1, 512),
    attribution_length=128,
    graphs=GraphSizes(32, 2048, 32, 128, 64, 16),
    seconds=1,
    rounds=(3, 5),
)

SMOKE = Sizes(
    name="smoke",
    shapes=((1, 5), (2, 9)),
    grad_shape=(1, 9),
    long_shape=(1, 17),
    E=32,
    N=4,
    heads=(2, 8, 8),
    delta_heads=((2, 8), (2, 8)),
    d_model=16,
    n_layers=2,
    d_vocab=40,
    new_tokens=2,
    analysis=((16, 9),),
    sweep=(16, 2, 5),
    attention_shape=(2, 17),
    attribution_length=8,
    graphs=GraphSizes(5, 24, 3, 6, 4, 4),
    seconds=0,
    rounds=(1, 1),
    fresh_process=False,
    compiled=False,
)

BY_NAME = {sizes.name: sizes for sizes in (FULL, QUICK, SMOKE)}
