"""What targets are made of, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.frozen.run import Part


@dataclass(kw_only=True)
class Parts:
    """Parts of n targets. Keys are layers; of a branch that is no mixer "{layer}.{branch}"."""

    embeddings: Float[Tensor, "n l"]
    """What each token's embedding adds."""
    heads: dict[Part, Float[Tensor, "n l E"]] = field(default_factory=dict)
    """Layer -> what the scan's term of source s and channel e adds: ub_s u_s."""
    token_heads: dict[Part, Float[Tensor, "n l E"]] = field(default_factory=dict)
    """Layer -> what token s adds through all taps of channel e; with the convolution's bias they sum as heads do.
    In split layers the local part, which the features stand for, is left out."""
    experts: dict[Part, Float[Tensor, "n l X"]] = field(default_factory=dict)
    """Layer ("3.moe") -> what each expert adds at each position, 0 where it was not chosen; sums over its neurons."""
    node_heads: dict[Part, Float[Tensor, "n m"]] = field(default_factory=dict)
    """Layer -> what the channels add that are nodes of their own, in the order of their (source, channel). In split
    layers the source is the token."""
    features: dict[int, Float[Tensor, "n l k"]] = field(default_factory=dict)
    """Layer -> what the active latents add."""
    coder_biases: dict[int, Float[Tensor, " n"]] = field(default_factory=dict)
    """Layer -> b_dec."""
    errors: dict[int, Float[Tensor, "n l"]] = field(default_factory=dict)
    """Layer -> what the coder misses, at each position."""
    carried: dict[str, Float[Tensor, "n l"]] = field(default_factory=dict)
    """Name of a value that one layer makes for several above it (RWKV-7's "v_first") -> what they take of it, at each
    position. It is another cut through the same paths, as heads are, and goes on to the embeddings."""
    biases: dict[Part, Float[Tensor, " n"]] = field(default_factory=dict)
    """Layer -> biases of projections and convolution."""
    initial: dict[Part, Float[Tensor, " n"]] = field(default_factory=dict)
    """Layer -> memory before the first position."""

    @classmethod
    def joined(cls, pieces: Sequence[Parts]) -> Parts:
        """Those of several batches of targets, one behind the other."""
        found = Parts(embeddings=torch.cat([piece.embeddings for piece in pieces]))
        for part in fields(found)[1:]:
            by_key = getattr(pieces[0], part.name)
            mine = {key: torch.cat([getattr(piece, part.name)[key] for piece in pieces]) for key in by_key}
            setattr(found, part.name, mine)
        return found
