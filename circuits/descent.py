"""Covectors propagated down the frozen model.

1. From the last layer down, and in each layer from its last stage down, targets that start there join; V is the
   covector on the stream above.
2. Each branch's share is read off: channels, or features and error.
3. V' = V + what passes through the frozen branches is the covector on the stream below. Through a branch whose output
   (or whose write into memory) a coder replaces, nothing passes: paths end at its features.
4. At the bottom V is multiplied with the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.coded_layer import CodedLayer
from circuits.frozen_model import FrozenModel
from circuits.parts import Parts
from circuits.targets import Covector, Stream
from hooked_mamba.frozen.chain import Pulled
from hooked_mamba.frozen.places import Part, branch_of, part_of
from hooked_mamba.frozen.routed import of_experts

SHARES = 8
"""How many parts a prompt is divided into, to find covectors that start close together."""

INSIDE: tuple[Stream, ...] = ("y", "u", "p")
"""Nodes of a branch at which targets may start."""


def depth(covector: Covector) -> int:
    """How many layers, from the bottom, add to a number."""
    layer = int(str(covector.layer).partition(".")[0])
    return layer if covector.stream == "resid" else layer + 1


class Descent:
    """Some covectors, propagated down together.

    Parameters
    ----------
    frozen
        The run.
    covectors, rows
        n targets and their rows of the batch.
    read_out
        Layers whose output some target reads, here or in another batch of the same call.
    keep_heads
        Whether to keep what each channel adds.
    nodes
        Part -> 1 at units (channels, heads, neurons, experts) where paths end, l U.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        covectors: list[Covector],
        rows: Int[Tensor, " n"],
        read_out: set[Part],
        keep_heads: bool,
        nodes: Mapping[Part, Float[Tensor, "l U"]],
    ) -> None:
        self.frozen, self.covectors, self.rows = frozen, covectors, cast(Any, rows)
        self.all_rows, self.depths = rows, [depth(covector) for covector in covectors]
        self.top = max(self.depths)
        """Layers from here up add nothing to any of them."""
        self.read_out, self.keep_heads, self.nodes = read_out, keep_heads, nodes
        self.carried: dict[str, Tensor] = {}
        """Covectors on values that a lower layer makes for several above it, by name."""
        self.at_embedding: Float[Tensor, "n l d"] | None = None
        """Covectors on the embedding as blocks read it that read it once more."""
        self.parts = Parts(embeddings=frozen.resid(0).new_zeros(len(covectors), frozen.length))

    def run(self) -> Parts:
        """Contributions to the targets."""
        frozen, V = self.frozen, self.start()
        for layer in range(self.top, frozen.n_layers):
            for part in frozen.parts(layer):
                self.nothing(part)
        for layer in reversed(range(self.top)):
            V = self.join(self.grown(V, self.going(layer)), "resid", layer + 1)
            self.rows = self.started(len(V))
            for stage in reversed(frozen.stages(layer)):
                above = V
                read = torch.zeros_like(V)  # on what the stage reads
                for part in stage:
                    read = self.join(read + self.below(part, above), "in", part)
                V = above + read + self.beside(layer, read)
        V = self.join(self.grown(V, len(self.covectors)), "resid", 0)
        where = self.started(len(V))
        self.parts.embeddings = (V * frozen.embeddings[where]).sum(-1)
        if self.at_embedding is not None:
            again = self.grown(self.at_embedding, len(V)) * frozen.embedded[where]
            self.parts.embeddings = self.parts.embeddings + again.sum(-1)
        return self.parts

    def start(self) -> Float[Tensor, "n l d"]:
        """The covectors on the stream above all targets: none yet."""
        bottom = self.frozen.resid(0)
        return bottom.new_zeros(0, self.frozen.length, bottom.shape[-1])

    def going(self, layer: int) -> int:
        """How many of the covectors, from the first on, have started when they go through a layer."""
        return max((i + 1 for i, count in enumerate(self.depths) if count > layer), default=0)

    def started(self, n: int) -> Any:
        """Where the constants of the first n covectors stand in the run's: their rows of it."""
        return self.all_rows[:n]

    def grown(self, V: Float[Tensor, "m ..."], n: int) -> Float[Tensor, "n ..."]:
        """More covectors, which are nothing yet."""
        return V if len(V) >= n else torch.cat([V, V.new_zeros(n - len(V), *V.shape[1:])])

    def below(self, part: Part, out: Float[Tensor, "n l d"]) -> Float[Tensor, "n l i"]:
        """Covectors on a branch's output, those that start at or in it included, as ones on what it reads."""
        found = self.from_carried(part) + self.through(part, self.join(out.clone(), "out", part))
        for node in INSIDE:
            found = found + self.from_inside(part, node)
        return found

    def beside(self, layer: int, read: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"] | float:
        """What passes to the stream below through a transformer beside it; what passes to the embedding is kept."""
        side = self.frozen.side(layer)
        if side is None:
            return 0.0
        v = side.into.pull(read).covector
        for part in reversed(side.parts):
            v = self.join(self.below(part, v), "in", part)
        below = side.split(v)
        above = self.at_embedding
        embedding = below.embedding
        self.at_embedding = embedding if above is None else self.grown(above, len(embedding)) + embedding
        return below.stream

    def join(self, V: Tensor, stream: Stream, part: Part) -> Tensor:
        """Let the targets that read this stream join, in place."""
        for i in self.reading(stream, part):
            V[i, self.covectors[i].columns] += self.covectors[i].vector
        return V

    def reading(self, stream: Stream, part: Part) -> list[int]:
        """Which covectors start at this stream."""
        return [i for i, c in enumerate(self.covectors) if (c.stream, c.layer) == (stream, part)]

    def through(self, part: Part, out: Float[Tensor, "n l d"]) -> Float[Tensor, "n l i"]:
        """What a branch's output adds goes into the parts; what passes to the stream below is returned.

        A coder does not stand between its own layer's output and a target that reads this very output: such targets
        go through the mixer itself.
        """
        coded, rows, parts = self._coded(part), self.rows, self.parts
        nodes = self._nodes(part)
        passing = None if nodes is None else 1 - self.frozen.chain(part).of_units(nodes, rows)
        if coded is not None and coded.node == "u":
            pulled = self.frozen.pull_to_u(part, out, rows)
            self.constants(part, pulled)
            return pulled.below + self.read_off(coded, pulled.at["u"], rows)
        if coded is None:
            pulled = self.frozen.pull(part, out, rows, passing)
            self.keep(part, pulled)
            return pulled.below
        mine: Bool[Tensor, " n"] = torch.zeros(len(out), dtype=torch.bool, device=out.device)
        mine[self.reading("out", part)] = True
        by_coder, by_mixer = out * ~mine[:, None, None], out * mine[:, None, None]
        below = torch.zeros_like(out)
        if self.frozen.is_split(part):
            below = self.across(coded.part, out, by_coder, nodes)
        elif part in self.read_out:
            pulled = self.frozen.pull(part, by_mixer, rows, passing)
            below = pulled.below
            self.keep(part, pulled)
        else:
            for constants in (parts.biases, parts.initial):
                constants.setdefault(part, out.new_zeros(len(out)))
        return below + self.read_off(coded, by_coder, rows)

    def spread(self, at_positions: Float[Tensor, "n l ..."]) -> Float[Tensor, "n l ..."]:
        """Numbers at the positions that covectors have, at all positions: here they have all."""
        return at_positions

    def read_off(
        self, coded: CodedLayer, V: Float[Tensor, "n l e"], rows: Any, whole: bool = False
    ) -> Float[Tensor, "n l i"] | float:
        """What features, error and b_dec add to covectors where the coder stands; what its skip passes is returned.

        Parameters
        ----------
        whole
            Whether the covectors are at all positions, whatever those on the stream are.
        """
        if coded.node == "u":
            V = self.frozen.chain(coded.part).on_site(V, coded.coder.cfg.d_out)
        features, errors = coded.feature_effects(V, rows), coded.error_effects(V, rows)
        if not whole:
            features, errors = self.spread(features), self.spread(errors)
        found = {"features": features, "coder_biases": coded.bias_effect(V), "errors": errors}
        for name, value in found.items():
            there = getattr(self.parts, name)
            there[coded.part] = there[coded.part] + value if coded.part in there else value
        skip = coded.pull_skip(self.frozen, V, rows)
        if skip is None:
            return 0.0
        below, bias = skip
        self.add_constants(coded.part, bias, torch.zeros_like(bias))
        return below

    def nothing(self, part: Part) -> None:
        """The share of a branch above all targets: zeros where :meth:`through` would have its numbers."""
        frozen, parts, coded, nodes = self.frozen, self.parts, self._coded(part), self._nodes(part)
        n, l = 0, frozen.length
        zeros = parts.embeddings.new_zeros
        parts.biases[part], parts.initial[part] = zeros(n), zeros(n)
        for name in frozen.chain(part).gives:
            if (given := self._nodes(part_of(branch_of(part)[0], name))) is not None:
                parts.node_heads[part_of(branch_of(part)[0], name)] = zeros(n, int(given.sum()))
        if coded is None or frozen.is_split(part) or (part in self.read_out and coded.node == "out"):
            chain = frozen.chain(part)
            if chain.routing is not None:
                parts.experts[part] = zeros(n, l, chain.routing.n_experts)
            if self.keep_heads:
                width = chain.width
                parts.heads[part], parts.token_heads[part] = zeros(n, l, width), zeros(n, l, width)
            if nodes is not None:
                parts.node_heads[part] = zeros(n, int(nodes.sum()))
        if coded is not None:
            parts.features[part] = zeros(n, l, coded.codes.values.shape[-1])
            parts.coder_biases[part], parts.errors[part] = zeros(n), zeros(n, l)

    def across(
        self, layer: Part, out: Float[Tensor, "n l d"], by_coder: Float[Tensor, "n l d"], nodes: Tensor | None
    ) -> Float[Tensor, "n l d"]:
        """A split layer's cross-token part, whose sources are tokens: paths end at p where channels are nodes."""
        chain, rows = self.frozen.chain(layer), self.rows
        pulled = self.frozen.pull(layer, out, rows)
        pb = pulled.at["p"] - chain.pull_own(by_coder, rows)
        if self.keep_heads:
            self.parts.heads[layer] = pulled.at["u"] * chain.u[rows]
            self.parts.token_heads[layer] = pb * chain.p[rows]
        self.constants(layer, pulled)
        self.carry(pulled)
        if nodes is not None:
            ending = pb * nodes
            source, channel = nodes.nonzero(as_tuple=True)
            self.parts.node_heads[layer] = (ending * chain.p[rows])[:, source, channel]
            pb = pb - ending
            self.parts.biases[layer] = self.parts.biases[layer] - chain.pull(ending, rows, start="p").bias
        return chain.pull(pb, rows, start="p").below

    def carry(self, pulled: Pulled) -> None:
        """Add a branch's covectors on values that lower layers make to those of the layers above."""
        for name, covector in pulled.carried.items():
            above = self.carried.get(name)
            self.carried[name] = covector if above is None else self.grown(above, len(covector)) + covector

    def from_carried(self, part: Part) -> Float[Tensor, "n l d"] | float:
        """What all layers above pull from the stream below through a value that this branch made for them."""
        chain = self.frozen.chain(part)
        below: Tensor | float = 0.0
        layer = branch_of(part)[0]
        for name, node in chain.gives.items():
            given, value = part_of(layer, name), chain.values[node]
            below = below + self.from_inside(given, "u")
            nodes = self._nodes(given)
            if name in self.carried:
                covector = self.grown(self.carried.pop(name), len(self.rows))
                self.parts.carried[name] = (covector * value[self.rows]).sum(-1)
                passing = covector if nodes is None else covector * (1 - nodes)
                pulled = self.frozen.pull_u(part, passing, self.rows)
                self.constants(part, pulled)
                below = below + pulled.below
            if nodes is not None:
                none = value.new_zeros(len(self.rows), self.frozen.length)
                effects = self.parts.carried.get(name, none)
                self.parts.node_heads[given] = effects[:, nodes.nonzero(as_tuple=True)[0]]
        return below

    def constants(self, part: Part, pulled: Pulled) -> None:
        """Add what biases and the memory before the first position give."""
        self.add_constants(part, pulled.bias, pulled.initial)

    def add_constants(self, part: Part, bias: Float[Tensor, " n"], initial: Float[Tensor, " n"]) -> None:
        """The same of numbers."""
        parts = self.parts
        parts.biases[part] = parts.biases[part] + bias if part in parts.biases else bias
        parts.initial[part] = parts.initial[part] + initial if part in parts.initial else initial

    def keep(self, part: Part, pulled: Pulled) -> None:
        """Read a branch's share off."""
        chain, rows, nodes = self.frozen.chain(part), self.rows, self._nodes(part)
        if self.keep_heads:
            self.parts.heads[part] = self.spread(pulled.at["u"] * chain.u[rows])
            self.parts.token_heads[part] = self.spread(pulled.at["p"] * chain.p[rows])
        if chain.routing is not None:
            self.parts.experts[part] = self.spread(of_experts(pulled.at["u"] * chain.u[rows], chain.routing, rows))
        if nodes is not None:
            source, index = nodes.nonzero(as_tuple=True)
            if chain.unit == 1:
                effects = pulled.at["u"][:, source, index] * chain.u[rows[:, None], source, index]
            else:
                effects = chain.by_unit(pulled.at["u"] * chain.u[rows], rows)[:, source, index]
            self.parts.node_heads[part] = effects
        self.constants(part, pulled)
        self.carry(pulled)

    def from_inside(self, part: Part, node: Stream) -> Float[Tensor, "n l d"] | float:
        """What targets on a node of this branch pull from the stream below."""
        mine = self.reading(node, part)
        if not mine:
            return 0.0
        chain = self.frozen.chain(part)
        like = chain.values.get(node, chain.u)
        covector = like.new_zeros(len(self.rows), *like.shape[1:])
        for i in mine:
            covector[i, self.covectors[i].columns] = self.covectors[i].vector
        coded = self._coded(part)
        if coded is not None and coded.node == "u" and node == "y":  # the features stand below
            pulled = chain.pull(covector, self.rows, start="y", until="u")
            self.constants(part, pulled)
            return self.read_off(coded, pulled.at["u"], self.rows)
        if node == "u":
            pulled = self.frozen.pull_u(part, covector, self.rows)
        else:
            pulled = chain.pull(covector, self.rows, start=node)
        self.constants(part, pulled)
        self.carry(pulled)
        return pulled.below

    def _coded(self, part: Part) -> CodedLayer | None:
        return self.frozen.coded.get(part)

    def _nodes(self, part: Part) -> Tensor | None:
        return self.nodes.get(part)


def share(length: int) -> int:
    """How many positions count as about the same."""
    return max(1, length // SHARES)


def until(covectors: Sequence[Covector], length: int) -> int:
    """Behind the positions of a batch, so rounded up that batches have such numbers in common."""
    step = share(length)
    return min(length, (max(covector.position for covector in covectors) // step + 1) * step)


def alike(covectors: Sequence[Covector], frozen: FrozenModel, most: int) -> list[list[int]]:
    """Batches of covectors that start at about the same position, the highest first, as places among all.

    What is behind the last position of a batch adds nothing to any of it, and is left out.

    Parameters
    ----------
    most
        Of a batch.
    """
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(covectors)), key=lambda i: -depth(covectors[i])):
        groups.setdefault(covectors[i].position // share(frozen.length), []).append(i)
    return [group[i : i + most] for _, group in sorted(groups.items()) for i in range(0, len(group), most)]
