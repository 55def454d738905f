"""A circuit as a graph: the direct effect of each node on each other one, at one prompt.

Rows of `weights` are targets: weights[i, j] is the contribution of node j to node i with all other nodes held. A row's
sum, with its `remainder` (features that are no nodes), is the node's own value, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mamba.frozen.places import Part, branch_of, part_of

Kind = Literal["target", "feature", "head", "error", "embed", "bias", "initial"]

KINDS: tuple[Kind, ...] = ("target", "feature", "head", "error", "embed", "bias", "initial")

TRACED: tuple[Kind, ...] = ("target", "feature", "head")
"""Kinds whose own inputs are nodes; all others are where paths end."""


@dataclass(frozen=True)
class Node:
    """One node. Its layer is that of its block; targets stand above the last (n_layers), embeddings below (-1)."""

    kind: Kind
    layer: int
    position: int
    """-1 for what belongs to no position: biases and the initial state."""
    index: int = 0
    """Feature, channel, or number of the target."""
    value: float = 0.0
    """What it was at this prompt: a logit, a pre-activation, a channel's u. 1 at the ends of paths."""
    activation: float = 0.0
    """Of a feature: how active it was."""
    name: str = ""
    """A target's own label, or what somebody called a feature."""
    branch: str = "mixer"
    """Which branch of the block: "mixer", "attn", "mlp", "moe"."""
    at: Literal["out", "u"] = "out"
    """Of a feature or an error, where its coder stands: the branch's output, or the value that enters its memory."""

    @property
    def part(self) -> Part:
        """The branch as the rest of the package names it: a mixer's layer, or as in "3.mlp"."""
        return part_of(self.layer, self.branch)

    @property
    def label(self) -> str:
        """As in `block1[3498]@5`, `write1[17]@2`, `mixer0[920]@3`, `attn2[5]@1`, `embed0@3`."""
        if self.kind == "target":
            return self.name
        place = "" if self.position < 0 else f"@{self.position}"
        if self.kind == "embed":
            return f"embed0{place}"
        index = f"[{self.index}]" if self.kind in ("feature", "head") else ""
        return f"{self._word}{index}{place}"

    @property
    def _word(self) -> str:
        layer, own = self.layer if self.layer >= 0 else "", self.branch == "mixer"
        if self.kind == "feature":
            return feature_word(self.part, self.at)
        if self.kind == "head":
            return f"{self.branch}{layer}"
        return f"{self.kind}{layer}{'' if own else f'.{self.branch}'}"

    @property
    def key(self) -> tuple[str, Part, int, int]:
        """What identifies it within a graph: kind, part, position and index."""
        return self.kind, self.part, self.position, self.index


def feature_word(part: Part, at: str) -> str:
    """What a branch's features are called: "block1", "write1", "attn2.write", "mlp2.block"."""
    layer, branch = branch_of(part)
    word = "write" if at == "u" else "block"
    return f"{word}{layer}" if branch == "mixer" else f"{branch}{layer}.{word}"


@dataclass(frozen=True)
class Graph:
    """Nodes and signed direct effects."""

    nodes: tuple[Node, ...]
    weights: Float[Tensor, "n n"]
    """weights[i, j]: what j adds to i."""
    remainder: Float[Tensor, " n"]
    """What features that are no nodes add to each node; with selection "gradient" also what a straight line misses."""
    tokens: tuple[str, ...]
    """The prompt."""
    importance: Float[Tensor, " n"]
    """Of the targets, 0 elsewhere; sums to 1."""
    about: dict[str, Any] = field(default_factory=dict)
    """Model, coders, mode, budgets: plain values that go to the file as they are."""
    supernodes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> nodes that somebody put together."""

    def __post_init__(self) -> None:
        n = len(self.nodes)
        shapes = {"weights": (n, n), "remainder": (n,), "importance": (n,)}
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} is {list(getattr(self, name).shape)}, expected {list(shape)}")
        if len({node.key for node in self.nodes}) != n:
            raise ValueError("two nodes of this graph are the same")
        for name, members in self.supernodes.items():
            if any(not 0 <= i < n for i in members):
                raise IndexError(f"supernode {name!r} holds a node that does not exist: {members}, there are {n}")

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        counts = {kind: sum(node.kind == kind for node in self.nodes) for kind in KINDS}
        what = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        return f"Graph({len(self)} nodes: {what}; {int((self.weights != 0).sum())} edges)"

    def where(self, *kinds: Kind) -> Bool[Tensor, " n"]:
        """A mask of the nodes of some kinds."""
        return torch.tensor([node.kind in kinds for node in self.nodes])

    def find(self, key: tuple[str, Part, int, int]) -> int:
        """A node's number by its key.

        Raises
        ------
        KeyError
            It is not here; says which of its kind are.
        """
        for i, node in enumerate(self.nodes):
            if node.key == key:
                return i
        same = [node.key for node in self.nodes if node.kind == key[0]]
        raise KeyError(f"no node {key}; there are {len(same)} of that kind, such as {same[:3]}")

    def keep(self, mask: Bool[Tensor, " n"]) -> Graph:
        """Some of the nodes; contributions of the others go into the remainder."""
        kept = mask.nonzero()[:, 0].tolist()
        new = {old: i for i, old in enumerate(kept)}
        gone = self.weights[kept][:, ~mask].sum(1)
        supernodes = {name: tuple(new[i] for i in members if i in new) for name, members in self.supernodes.items()}
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in kept),
            weights=self.weights[kept][:, kept],
            remainder=self.remainder[kept] + gone,
            importance=self.importance[kept],
            supernodes={name: members for name, members in supernodes.items() if members},
        )

    def with_supernode(self, name: str, members: Sequence[int]) -> Graph:
        """Group nodes under a name."""
        return replace(self, supernodes={**self.supernodes, name: tuple(members)})

    def renamed(self, names: dict[int, str]) -> Graph:
        """Give nodes names."""
        nodes = tuple(replace(node, name=names.get(i, node.name)) for i, node in enumerate(self.nodes))
        return replace(self, nodes=nodes)

    def values(self) -> Float[Tensor, " n"]:
        """Each node's own value."""
        return torch.tensor([node.value for node in self.nodes], dtype=self.weights.dtype)

    def residual(self) -> Float[Tensor, " n"]:
        """value - (row sum + remainder) of targets, features and heads: rounding. 0 where paths end."""
        explained = self.weights.sum(1) + self.remainder
        return torch.where(self.where(*TRACED), self.values() - explained, 0)
