"""A transformer beside the stream: what it makes of stream and embedding joins what one stage reads, not the stream.

[stream, embedding] -> attention -> MLP -> W -> added to the input of the block's mixer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.linear import Project


class Below(NamedTuple):
    """Covectors (or values) on the two halves that the transformer reads."""

    stream: Float[Tensor, "n l d"]
    embedding: Float[Tensor, "n l d"]


@dataclass(frozen=True)
class Side:
    """One use of a shared transformer at a run."""

    parts: tuple[str, ...]
    """Its branches ("3.attn", "3.mlp"), in the order of the forward pass."""
    into: Project
    """W."""

    def split(self, both: Float[Tensor, "n l two_d"]) -> Below:
        """What stands side by side, taken apart."""
        return Below(*both.chunk(2, -1))

    def joined(self, stream: Float[Tensor, "n l d"], embedding: Float[Tensor, "n l d"]) -> Float[Tensor, "n l two_d"]:
        """Side by side, as the first branch's norm reads them."""
        return torch.cat([stream, embedding.expand_as(stream)], -1)

    def apply(self, chains: Mapping[str, Chain], stream: Tensor, embedding: Tensor) -> Float[Tensor, "n l d"]:
        """What the branches, as these chains take them, add to the mixer's input."""
        x = self.joined(stream, embedding)
        for part in self.parts:
            x = chains[part].apply(x)["out"]
        return self.into.apply(x)
