"""Contributions to targets, part by part."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.frozen.places import Part

Nodes = Mapping[Any, Float[Tensor, "l U"]]
"""Part -> 1 at the units (channels of mixers, attention heads, neurons, experts) that are nodes of their own."""


@dataclass(kw_only=True)
class Parts:
    """Parts of n targets. Keys are layers; of a branch that is no mixer "{layer}.{branch}"."""

    embeddings: Float[Tensor, "n l"]
    """What each token's embedding adds."""
    heads: MutableMapping[Part, Float[Tensor, "n l E"]] = field(default_factory=dict)
    """Layer -> what the scan's term of source s and channel e adds: ub_s u_s."""
    token_heads: MutableMapping[Part, Float[Tensor, "n l E"]] = field(default_factory=dict)
    """Layer -> what token s adds through all taps of channel e; with the convolution's bias they sum as heads do.
    In split layers the local part, which the features stand for, is left out."""
    experts: dict[Part, Float[Tensor, "n l X"]] = field(default_factory=dict)
    """Layer ("3.moe") -> what each expert adds at each position, 0 where it was not chosen; sums over its neurons."""
    node_heads: dict[Part, Float[Tensor, "n m"]] = field(default_factory=dict)
    """Part -> what the units add that are nodes of their own, in the order of their (source, unit). In split layers the
    source is the token."""
    features: dict[Part, Float[Tensor, "n l k"]] = field(default_factory=dict)
    """Layer -> what the active latents add."""
    coder_biases: dict[Part, Float[Tensor, " n"]] = field(default_factory=dict)
    """Layer -> b_dec."""
    errors: dict[Part, Float[Tensor, "n l"]] = field(default_factory=dict)
    """Layer -> what the coder misses, at each position."""
    carried: dict[str, Float[Tensor, "n l"]] = field(default_factory=dict)
    """Name of a value that one layer makes for several above it (RWKV-7's "v_first") -> what they take of it, at each
    position. It is another cut through the same paths, as heads are, and goes on to the embeddings."""
    biases: dict[Part, Float[Tensor, " n"]] = field(default_factory=dict)
    """Layer -> biases of projections and convolution."""
    initial: dict[Part, Float[Tensor, " n"]] = field(default_factory=dict)
    """Layer -> memory before the first position."""

    @classmethod
    def joined(cls, pieces: Sequence[Parts], order: Sequence[Sequence[int]], length: int, nodes: Nodes) -> Parts:
        """Those of several batches of targets, which may have seen the beginning of a prompt alone, put in order.

        Parameters
        ----------
        order
            Of each batch, the places of its targets among all.
        length, nodes
            Positions of the prompt, and layer -> 1 at the channels that are nodes.
        """
        places = [torch.tensor(mine, dtype=torch.long) for mine in order]
        found = Parts(embeddings=_in_order([piece.embeddings for piece in pieces], places, length))
        for part in fields(found)[1:]:
            by_piece = [getattr(piece, part.name) for piece in pieces]
            for key in dict.fromkeys(key for one in by_piece for key in one):
                there = [one.get(key) for one in by_piece]
                width = int(nodes[key].sum()) if part.name == "node_heads" else length
                getattr(found, part.name)[key] = _in_order(there, places, width)
        return found


def _in_order(pieces: Sequence[Tensor | None], places: Sequence[Tensor], width: int) -> Tensor:
    """Rows of several tensors at their places; zeros where one is shorter than its places, or than the width."""
    there = next(piece for piece in pieces if piece is not None)
    if (
        len(pieces) == 1
        and places[0].tolist() == list(range(len(there)))
        and (there.ndim == 1 or len(there[0]) == width)
    ):
        return there  # without a copy: heads of a long prompt are large
    sizes = (width, *there.shape[2:]) if there.ndim > 1 else ()
    whole = there.new_zeros(sum(len(place) for place in places), *sizes)
    for piece, place in zip(pieces, places, strict=True):
        if piece is not None:
            seen = whole if piece.ndim == 1 else whole[:, : piece.shape[1]]
            seen[place[: len(piece)].to(whole.device)] = piece
    return whole


class Deferred(UserDict[Part, Tensor]):
    """Heads that are formed when they are first read, to save memory."""

    def __init__(self, form: Callable[[], Mapping[Part, Tensor]]) -> None:
        self._form = form

    @cached_property
    def data(self) -> dict[Part, Tensor]:  # type: ignore[override]
        return dict(self._form())
