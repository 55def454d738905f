"""Paths found step by step, with every head a node: no graph is built, and no head is chosen beforehand.

1. A target's covector goes one step down: all that adds to it directly is scored, in one pass for all paths that are
   being followed. A head receives what reaches it and passes nothing on.
2. The k largest over all these paths are kept. Each kept head or feature hands down its own covector, scaled so that
   every number on a path is what the target gets along it.
3. So on: paths of one edge, of two, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import require_sums
from circuits.descent import Descent
from circuits.frozen_model import FrozenModel
from circuits.graph import Kind, Node
from circuits.paths import Path, Paths
from circuits.published import EXACT, PathOptions, PublishedPulled, optioned
from circuits.targets import Covector, Feature, Target
from hooked_mamba.frozen.chain import Pulled
from hooked_mamba.frozen.places import Part, branch_of, in_order


@dataclass(frozen=True)
class Trace:
    """What :func:`trace_paths` found."""

    target: str
    value: float
    """The number in the prompt's run."""
    heads: dict[Part, Float[Tensor, "l E"]]
    """Part -> what the head (source, channel) adds directly, by the residual stream and by no other head. In split
    layers the source is the token."""
    paths: tuple[Paths, ...]
    """The k largest paths of one edge, of two, ...; a node's value is what reaches the target through it."""

    def __str__(self) -> str:
        return "\n".join(f"edges: {i}\n{found}" for i, found in enumerate(self.paths, 1))


@torch.no_grad()
def trace_paths(
    frozen: FrozenModel,
    target: Target,
    *,
    k: int = 5,
    length: int = 2,
    row: int = 0,
    preset: str | PathOptions | None = None,
) -> Trace:
    """The k largest paths from a target down, of each length, and what every head adds directly.

    Exact unless told otherwise: all paths of one length, with those that ended before, sum to the target; `remainder`
    is what the listed paths of that length leave of it. Only the k largest are followed at each step, so that a large
    path behind a small first edge is missed; :func:`circuits.top_paths` misses none among the nodes of a graph.

    Parameters
    ----------
    frozen
        A run, with the coders that it is read through.
    target
        Where paths start.
    k
        Paths kept at each step; 1 is the greedy path.
    length
        Most edges of a path.
    row
        Of the batch.
    preset
        "mambacoder" for the published method, :class:`circuits.PathOptions` for some of its choices; None: exact.

    Raises
    ------
    ValueError
        k or length below 1, an unknown preset, or one together with a `selection`.
    IndexError
        No such row.
    """
    for name, number in (("k", k), ("length", length)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= row < frozen.batch:
        raise IndexError(f"row {row} is out of range: this run has {frozen.batch}")
    require_sums(frozen, [target])
    options = PathOptions.of(preset)
    frozen = frozen if options == EXACT else optioned(frozen, options)
    start = target.covector(frozen, row)
    root = Node("target", frozen.n_layers, -1, value=float(start.value), name=target.label)
    going: list[tuple[tuple[Node, ...], Covector]] = [((root,), start)]
    heads: dict[Part, Tensor] = {}
    listed: list[Paths] = []
    while going and len(listed) < length:
        step = _Step(frozen, [covector for _, covector in going], row, options)
        step.run()
        heads = heads or {part: step.effects[part][0] for part in sorted(step.effects, key=in_order)}
        kept = step.largest(k)
        paths = [(*going[i][0], node) for i, node, _ in kept]
        listed.append(Paths(tuple(_path(nodes) for nodes in paths), root.value))
        going = [(nodes, below) for nodes, (_, _, below) in zip(paths, kept, strict=True) if below is not None]
    return Trace(target.label, root.value, heads, tuple(listed))


def _path(nodes: tuple[Node, ...]) -> Path:
    edges = tuple(node.value for node in nodes[1:])
    return Path(nodes, edges, edges[-1])


@dataclass(frozen=True)
class _Group:
    """Nodes of one kind and branch, and what they add to each covector."""

    kind: Kind
    part: Part
    effects: Float[Tensor, "n ..."]
    at: Literal["out", "u"] = "out"

    def node(self, position: int, index: int, value: float, activation: float = 0.0) -> Node:
        layer, branch = branch_of(self.part)
        return Node(self.kind, layer, position, index, value, activation, branch=branch, at=self.at)


class _Step(Descent):
    """All that adds directly to some covectors of one row."""

    def __init__(self, frozen: FrozenModel, covectors: list[Covector], row: int, options: PathOptions) -> None:
        nodes: dict[Part, Tensor] = {
            layer: torch.ones_like(frozen.chain(layer).u[0])
            for layer in range(frozen.n_layers)
            if "mixer" in frozen.model.block(layer).branches
        }
        rows = torch.full((len(covectors),), row, device=frozen.tokens.device)
        super().__init__(frozen, covectors, rows, {c.layer for c in covectors if c.stream == "out"}, True, nodes)
        self.row, self.options = row, options
        self.top, self.depths = frozen.n_layers, [frozen.n_layers] * len(covectors)  # all layers are listed
        self.effects: dict[Part, Float[Tensor, "n l E"]] = {}
        """Layer -> what each head adds."""
        self.onward: dict[Part, Float[Tensor, "n l E"]] = {}
        """Layer -> the covector with which each head goes on."""

    def through(self, layer: Part, out: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        """As in `Descent`; with nodes="beside" a coded layer's mixer and its features, each as if alone."""
        coded = self._coded(layer)
        nodes = self._nodes(layer)
        if coded is None or nodes is None or self.options.nodes == "once":
            return super().through(layer, out)
        pulled = self.frozen.pull(layer, out, self.rows, 1 - nodes)
        self.keep(layer, pulled)
        mine = self.reading("out", layer)
        self.parts.features[layer] = coded.feature_effects(out, self.rows)
        self.parts.features[layer][mine] = 0
        return pulled.below

    def across(
        self, layer: Part, out: Float[Tensor, "n l d"], by_coder: Float[Tensor, "n l d"], nodes: Tensor | None
    ) -> Float[Tensor, "n l d"]:
        below = super().across(layer, out, by_coder, nodes)
        p = self.frozen.chain(layer).p[self.rows]
        self.effects[layer] = self.parts.token_heads[layer]
        self.onward[layer] = torch.where(p == 0, 0, self.effects[layer] / torch.where(p == 0, 1, p))
        return below

    def keep(self, layer: Part, pulled: Pulled) -> None:
        super().keep(layer, pulled)
        if not isinstance(layer, int):
            return
        u = self.frozen.chain(layer).u[self.rows]
        self.effects[layer] = pulled.heads if isinstance(pulled, PublishedPulled) else pulled.at["u"] * u
        self.onward[layer] = pulled.at["u"]

    def groups(self) -> list[_Group]:
        """All nodes that paths may go to."""
        parts, total = self.parts, self.options.head == "argmax_sum"
        found = [_Group("head", i, effects.sum(-1) if total else effects) for i, effects in self.effects.items()]
        found += [_Group("feature", i, effects, self.frozen.coded[i].node) for i, effects in parts.features.items()]
        found += [_Group("embed", -1, parts.embeddings)]
        if self.options.nodes == "once":
            found += [_Group("error", i, effects, self.frozen.coded[i].node) for i, effects in parts.errors.items()]
            offset = torch.stack([covector.offset for covector in self.covectors])
            constants = [offset, *parts.coder_biases.values(), *parts.biases.values()]
            found.append(_Group("bias", -1, torch.stack(constants).sum(0)))
            found.append(_Group("initial", -1, torch.stack([0 * offset, *parts.initial.values()]).sum(0)))
        return found

    def largest(self, k: int) -> list[tuple[int, Node, Covector | None]]:
        """The k largest over all covectors: which one, the node, and the node's own covector; None where paths end."""
        groups, n = self.groups(), len(self.covectors)
        sizes = [group.effects.reshape(n, -1).shape[1] for group in groups]
        effects = torch.cat([group.effects.reshape(n, -1) for group in groups], 1)
        scores = effects if self.options.rank == "signed" else effects.abs()
        kept = []
        for place in scores.flatten().topk(min(k, scores.numel())).indices.tolist():
            i, at = divmod(place, effects.shape[1])
            if effects[i, at] == 0:
                continue
            g = 0
            while at >= sizes[g]:
                at, g = at - sizes[g], g + 1
            kept.append((i, *self.node(i, groups[g], at)))
        return kept

    def node(self, i: int, group: _Group, at: int) -> tuple[Node, Covector | None]:
        """One node of a group as reached from covector i, and its own covector."""
        effect, width = group.effects.reshape(len(group.effects), -1)[i, at], group.effects.shape[2:].numel()
        value, position = float(effect), at // width
        if group.kind == "head":
            channel = at % width if self.options.head == "each" else None
            return self.head(i, group, position, channel, effect)
        if group.kind == "feature":
            coded = self.frozen.coded[group.part]
            index = int(coded.codes.indices[self.row, position, at % width])
            activation = float(coded.codes.values[self.row, position, at % width])
            read = Feature(coded.coder, index, position).covector(self.frozen, self.row)
            scale = effect / read.value
            below = read._replace(vector=read.vector * scale, offset=read.offset * scale, value=effect)
            return group.node(position, index, value, activation), below
        return group.node(position if group.kind in ("embed", "error") else -1, 0, value), None

    def head(
        self, i: int, group: _Group, position: int, channel: int | None, effect: Float[Tensor, ""]
    ) -> tuple[Node, Covector]:
        """A head, or all channels of a source under the name of the one that adds most."""
        layer = group.part
        vector, coded = self.onward[layer][i, position], self.frozen.coded.get(layer)
        if channel is None:
            channel = int(self.effects[layer][i, position].argmax())
        else:
            alone = torch.zeros_like(vector)
            alone[channel] = vector[channel]
            vector = alone
        by_token = coded is not None and coded.mode == "split" and self.options.nodes == "once"
        covector = Covector("p" if by_token else "u", layer, position, vector, 0 * effect, effect)
        return group.node(position, channel, float(effect)), covector
