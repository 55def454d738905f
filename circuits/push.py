"""Interventions on the frozen model, forwards: how changes from outside propagate to everything above them.

This is the check of a graph from the other side: rows of the graph come from covectors pulled back, these changes
from vectors pushed forward. On the frozen model the two agree to rounding; on the real one nothing is promised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.frozen_model import FrozenModel
from circuits.graph import Graph, Node
from circuits.targets import Covector, Feature, Target, Unit, chosen_targets
from hooked_mamba.frozen.chain import Shares
from hooked_mamba.frozen.places import Part, Stream, branch_of, part_of

Inside = Callable[[int, Tensor, Tensor | float, bool], Tensor | float]
"""(layer, change of the stream entering its block, change of u by values of lower layers, whole) -> what edits inside
its mixer add to its output; `whole`: as if no coder stood in the mixer's place."""


@dataclass
class Changes:
    """What is changed from outside: n interventions side by side, each on a row of the run."""

    rows: Int[Tensor, " n"]
    streams: dict[int, Float[Tensor, "n l d"]] = field(default_factory=dict)
    """Layer -> added to the stream entering it; 0: to the embeddings."""
    heads: dict[Part, Float[Tensor, "n l E"]] = field(default_factory=dict)
    """Part -> added to u (also where a coder stands in its place), in split layers to p."""
    outs: dict[Part, Float[Tensor, "n l d"]] = field(default_factory=dict)
    """Part -> added to its output."""
    held: dict[Part, Float[Tensor, "l E"]] = field(default_factory=dict)
    """Part -> 0 at heads that hold their value, 1 elsewhere."""
    inside: Inside | None = None


class Pushed:
    """The changes of all streams of a frozen run.

    Parameters
    ----------
    frozen
        The run.
    changes
        What is changed from outside.
    """

    def __init__(self, frozen: FrozenModel, changes: Changes) -> None:
        self.frozen, self.changes = frozen, changes
        bottom = frozen.resid(0)
        delta = bottom.new_zeros(len(changes.rows), *bottom.shape[1:])
        self.streams: dict[int, Tensor] = {}
        """Layer -> of the stream entering it; n_layers: after the last block."""
        self.inner: dict[Part, Tensor] = {}
        """Part -> of u, in split layers of p, as the stream below makes it."""
        self.carried: dict[str, Tensor] = {}
        """Name -> of a value that a layer made for those above it."""
        self.taken: dict[Part, Tensor | float] = {}
        """Part -> of u, by such values of layers below."""
        self.entering: dict[Part, Tensor] = {}
        """Part -> of the stream that its norm reads."""
        for layer in range(frozen.n_layers):
            delta = self.streams[layer] = delta + changes.streams.get(layer, 0.0)
            for stage in frozen.stages(layer):
                entering = delta + self.beside(layer, delta)
                for part in stage:
                    delta = delta + self.through(part, entering)
        self.streams[frozen.n_layers] = delta + changes.streams.get(frozen.n_layers, 0.0)

    def beside(self, layer: int, delta: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"] | float:
        """What a transformer beside the stream makes of its change, and of the embeddings'."""
        side = self.frozen.side(layer)
        if side is None:
            return 0.0
        x = side.joined(delta, self.changes.streams.get(0, torch.zeros_like(delta)))
        for part in side.parts:
            x = self.through(part, x)
        return side.into.push(x)

    def through(self, part: Part, delta: Float[Tensor, "n l i"]) -> Float[Tensor, "n l d"]:
        """What a branch makes of a change of the stream that its stage reads."""
        frozen, changes, rows = self.frozen, self.changes, self.changes.rows
        chain = frozen.chain(part)
        self.entering[part] = delta
        taken = self.taken[part] = self.take(part)
        if chain.gives:
            made = chain.push(delta, rows, until="u")[0] + taken
            for name in chain.gives:  # heads that hold are those of this layer's own scan
                given = part_of(branch_of(part)[0], name)
                self.entering[given], self.inner[given] = delta, made
                self.carried[name] = made * changes.held.get(given, 1.0) + changes.heads.get(given, 0.0)
        coded = frozen.coded.get(part)
        bottom = frozen.resid(0)
        out = bottom.new_zeros(len(rows), *bottom.shape[1:]) + changes.outs.get(part, 0.0)
        if coded is not None and coded.node == "u":
            self.inner[part] = chain.push(delta, rows, until="u")[0] + taken
            out = out + chain.push(self.written(part, delta), rows, start="u")[0]
        elif coded is None:
            passed, met = chain.push(delta, rows, *self._here(part))
            out, self.inner[part] = out + passed + self.from_taken(part), met["u"] + taken
        elif frozen.is_split(part):
            p, met = chain.push(delta, rows, until="p")
            self.inner[part] = p
            held, added = changes.held.get(part), changes.heads.get(part)
            p = p if held is None else p * held
            out = out + chain.push_across(p if added is None else p + added, rows) + self.from_taken(part)
        elif part in changes.heads:  # a write is changed, and the coder stands at the output
            out = out + chain.push(changes.heads[part], rows, start="u")[0]
        if coded is not None and coded.node == "out":
            out = out + coded.push_skip(frozen, delta, rows)
        if changes.inside is not None and isinstance(part, int):
            out = out + changes.inside(part, delta, taken, False)
        return out

    def written(self, part: Part, delta: Float[Tensor, "n l i"]) -> Float[Tensor, "n l E"]:
        """The change of u where a coder stands in its place: what is changed from outside, and the coder's skip."""
        coded, chain = self.frozen.coded[part], self.frozen.chain(part)
        skip = coded.push_skip(self.frozen, delta, self.changes.rows)
        none = chain.u.new_zeros(len(self.changes.rows), *chain.u.shape[1:])
        return none + self.changes.heads.get(part, 0.0) + (chain.of_site(skip) if isinstance(skip, Tensor) else skip)

    def take(self, part: Part) -> Tensor | float:
        """What values that lower layers made add to a branch's u."""
        changed: Tensor | float = 0.0
        for name, gain in self.frozen.chain(part).takes.items():
            changed = changed + gain.of(self.changes.rows).push(self.carried[name])
        return changed

    def from_taken(self, part: Part, until: str | None = None) -> Tensor | float:
        """What becomes of that; heads of mixers hold, in split layers those of the tokens, which it is not from."""
        taken = self.taken[part]
        if not isinstance(taken, Tensor):
            return taken
        held = None
        if not self.frozen.is_split(part):
            held = self.changes.held.get(part)
        taken = taken if held is None else taken * held
        return self.frozen.chain(part).push(taken, self.changes.rows, start="u", until=until)[0]

    def _here(self, layer: Part) -> tuple[Shares | None, Mapping[str, Tensor] | None]:
        """Shares and additions at u."""
        held, added = self.changes.held.get(layer), self.changes.heads.get(layer)
        return None if held is None else {"u": held}, None if added is None else {"u": added}

    def read(self, covector: Covector) -> Float[Tensor, " n"]:
        """The change of a target.

        A mixer's output is read as the mixer's own, whether or not a coder stands in its place.
        """
        return covector.of(self.of(covector.stream, covector.layer))

    def of(self, stream: Stream, part: Part) -> Float[Tensor, "n l e"]:
        """The change of a stream."""
        frozen, changes = self.frozen, self.changes
        if stream == "resid":
            return self.streams[int(part)]
        entering = self.entering[part]
        if stream == "in":
            return entering
        if stream != "u" and stream != "p" and frozen.is_written(part):  # what is read is read of the features' writes
            until = None if stream == "out" else stream
            found = frozen.chain(part).push(self.written(part, entering), changes.rows, start="u", until=until)[0]
            if stream == "out" and changes.inside is not None and isinstance(part, int):
                found = found + changes.inside(part, entering, self.taken[part], False)
            return found
        if stream == "out":
            out = frozen.chain(part).push(entering, changes.rows, *self._here(part))[0] + self.from_taken(part)
            if changes.inside is not None and isinstance(part, int):
                out = out + changes.inside(part, entering, self.taken[part], True)
            return out
        if part in self.inner and stream == frozen.channels_at(part):
            return self.inner[part]
        value = frozen.chain(part).push(entering, changes.rows, until=stream)[0]
        return value if stream == "p" else value + self.from_taken(part, stream)


@torch.no_grad()
def frozen_changes(
    frozen: FrozenModel, graph: Graph, targets: Target | Sequence[Any], nodes: Sequence[int]
) -> Float[Tensor, "k n"]:
    """How all nodes of a graph change when each of `nodes` alone is removed and the others are held.

    Parameters
    ----------
    frozen
        The run that the graph was built from.
    graph
        Before pruning, or after.
    targets
        Those that it was built for.
    nodes
        Their numbers: embeddings, errors, features, heads.

    Returns
    -------
    Tensor
        Row k: the change of each node's value; targets, features (pre-activations) and heads (u), 0 for others.
        It is minus the column of the graph's weights.

    Raises
    ------
    ValueError
        A node that cannot be removed: a target, biases, the initial state.
    """
    removed = [graph.nodes[i] for i in nodes]
    for node in removed:
        if node.kind in ("target", "bias", "initial"):
            raise ValueError(f"{node.label} cannot be taken away: choose embeddings, errors, features or heads")
    pushed = Pushed(frozen, _without_each(frozen, removed, held_heads(frozen, graph)))
    chosen = chosen_targets(targets)
    changes = frozen.resid(0).new_zeros(len(removed), len(graph))
    for i, node in enumerate(graph.nodes):
        if node.kind == "head":
            changes[:, i] = pushed.read(Unit(node.part, node.index, node.position).covector(frozen, 0))
        elif node.kind in ("feature", "target"):
            read = chosen[node.index] if node.kind == "target" else _feature(frozen, node)
            changes[:, i] = pushed.read(read.covector(frozen, 0))
    return changes.to(graph.weights.device)


def held_heads(frozen: FrozenModel, graph: Graph) -> dict[Part, Float[Tensor, "l E"]]:
    """Part -> 0 at the heads that are nodes, 1 elsewhere."""
    masks: dict[Part, Tensor] = {}
    for node in graph.nodes:
        if node.kind == "head":
            chain = frozen.chain(node.part)
            mask = masks.setdefault(node.part, torch.ones_like(chain.u[0]))
            mask[node.position, chain.channels_of(node.index, 0, node.position)] = 0
    return masks


def _without_each(frozen: FrozenModel, removed: Sequence[Node], held: dict[Part, Tensor]) -> Changes:
    """One intervention for each node: it alone is removed."""
    k, bottom = len(removed), frozen.resid(0)
    changes = Changes(torch.zeros(k, dtype=torch.long, device=frozen.tokens.device), held=held)
    empty = bottom.new_zeros(k, *bottom.shape[1:])
    for i, node in enumerate(removed):
        if node.kind == "embed":
            at = changes.streams.setdefault(0, empty.clone())
            at[i, node.position] = -frozen.resid(0)[0, node.position]
        elif node.kind == "head":
            values = frozen.channel_values(node.part)
            at = changes.heads.setdefault(node.part, values.new_zeros(k, *values.shape[1:]))
            channels = frozen.chain(node.part).channels_of(node.index, 0, node.position)
            at[i, node.position, channels] = -values[0, node.position, channels]
        else:
            coded = frozen.coded[node.part]
            feature = node.activation * coded.W_dec[node.index].to(empty.dtype)
            change = feature if node.kind == "feature" else coded.error[0, node.position]
            if coded.node == "u":
                chain = frozen.chain(node.part)
                at = changes.heads.setdefault(node.part, chain.u.new_zeros(k, *chain.u.shape[1:]))
                change = chain.of_site(change)
            else:
                at = changes.outs.setdefault(node.part, empty.clone())
            at[i, node.position] -= change
    return changes


def _feature(frozen: FrozenModel, node: Node) -> Feature:
    return Feature(frozen.coded[node.part].coder, node.index, node.position)
