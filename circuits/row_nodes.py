"""The columns of a graph's rows, before it is known which of them become nodes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Attribution
from circuits.frozen_model import FrozenModel
from circuits.graph import Kind, Node
from hooked_mamba.frozen.places import Part, branch_of, in_order

ENDS: tuple[Kind, ...] = ("embed", "error", "bias", "initial")
"""Kinds of nodes that nothing adds to."""


@dataclass(frozen=True)
class Section:
    """Columns of one kind and branch, side by side."""

    kind: Kind
    part: Part
    places: Int[Tensor, "m 2"]
    """Position and index of each."""
    activations: Float[Tensor, " m"] | None = None
    """Of features."""
    at: Literal["out", "u"] = "out"
    """Of features and errors, where their coder stands."""

    def node(self, i: int) -> Node:
        """One of them."""
        layer, branch = branch_of(self.part)
        position, index = self.places[i].tolist()
        activation = 0.0 if self.activations is None else float(self.activations[i])
        value = 0.0 if self.kind in ("feature", "head") else 1.0
        return Node(self.kind, layer, position, index, value, activation, branch=branch, at=self.at)


class RowNodes:
    """What a row of effects is made of, in order: embeddings, errors, features, heads, bias, initial state.

    There are many, and few become nodes of a graph, so that each is made when it is asked for.

    Parameters
    ----------
    frozen
        The run.
    heads
        Part -> 1 at channels that are nodes.
    """

    def __init__(self, frozen: FrozenModel, heads: Mapping[Part, Tensor]) -> None:
        tokens = torch.stack([torch.arange(frozen.length), torch.zeros(frozen.length, dtype=torch.long)], 1)
        nowhere = torch.tensor([[-1, 0]])
        self.sections = [Section("embed", -1, tokens)]
        coders = [frozen.coded[part] for part in sorted(frozen.coded, key=in_order)]
        self.sections += [Section("error", coded.part, tokens, at=coded.node) for coded in coders]
        for coded in coders:
            values, indices = coded.codes.values[0].cpu(), coded.codes.indices[0].cpu()
            positions = torch.arange(frozen.length)[:, None].expand(indices.shape)
            places = torch.stack([positions, indices], -1).flatten(0, 1)
            self.sections.append(Section("feature", coded.part, places, values.flatten(), coded.node))
        self.sections += [Section("head", part, heads[part].nonzero().cpu()) for part in sorted(heads, key=in_order)]
        self.sections += [Section("bias", -1, nowhere), Section("initial", -1, nowhere)]
        self.starts = [0, *accumulate(len(section.places) for section in self.sections)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, column: int) -> Node:
        i = bisect_right(self.starts, column) - 1
        return self.sections[i].node(column - self.starts[i])

    def of_kind(self, kind: Kind) -> list[int]:
        """Columns of one kind; of features those that are active."""
        found: list[int] = []
        for start, section in zip(self.starts, self.sections, strict=False):
            if section.kind == kind:
                active = torch.ones(len(section.places)) if section.activations is None else section.activations
                found += (start + active.nonzero().flatten()).tolist()
        return found

    @staticmethod
    def rows(found: Attribution) -> Float[Tensor, "n m"]:
        """Effects of all columns on each target."""
        parts = [found.embeddings]
        parts += [found.errors[i] for i in sorted(found.errors, key=in_order)]
        parts += [found.features[i].flatten(1) for i in sorted(found.features, key=in_order)]
        parts += [found.node_heads[i] for i in sorted(found.node_heads, key=in_order)]
        constants = [found.offset, *found.coder_biases.values(), *found.biases.values()]
        bias = torch.stack(constants).sum(0)
        initial = torch.stack([torch.zeros_like(bias), *found.initial.values()]).sum(0)
        return torch.cat([*parts, bias[:, None], initial[:, None]], 1)
