"""Covectors on their way down the frozen model.

1. From the last layer down, and in each from its last stage down, the targets that start there join; V is the covector
   on the stream above.
2. Each branch's share is read off: channels, or features and error.
3. V' = V + what passes through the frozen branches is the covector on the stream below.
4. At the bottom V meets the embeddings.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.coded_layer import CodedLayer
from circuits.frozen_model import FrozenModel
from circuits.parts import Parts
from circuits.targets import Covector, Stream
from hooked_mamba.frozen.chain import Pulled
from hooked_mamba.frozen.run import Part

INSIDE: tuple[Stream, ...] = ("y", "u", "p")
"""Nodes of a branch at which targets may start."""


class Descent:
    """Some covectors, going down at once.

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
        Layer -> 1 at channels where paths end.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        covectors: list[Covector],
        rows: Int[Tensor, " n"],
        read_out: set[int],
        keep_heads: bool,
        nodes: dict[int, Float[Tensor, "l E"]],
    ) -> None:
        self.frozen, self.covectors, self.rows = frozen, covectors, rows
        self.read_out, self.keep_heads, self.nodes = read_out, keep_heads, nodes
        self.carried: dict[str, Tensor] = {}
        """Covectors on values that a lower layer makes for several above it, by name."""
        self.parts = Parts(embeddings=frozen.resid(0).new_zeros(len(covectors), frozen.length))

    def run(self) -> Parts:
        """What the targets are made of."""
        frozen = self.frozen
        bottom = frozen.resid(0)
        V = bottom.new_zeros(len(self.covectors), frozen.length, bottom.shape[-1])
        self.join(V, "resid", frozen.n_layers)
        for layer in reversed(range(frozen.n_layers)):
            for stage in reversed(frozen.stages(layer)):
                above = V
                for part in stage:
                    V = V + self.from_carried(part)
                    V = V + self.through(part, self.join(above.clone(), "out", part))
                    for node in INSIDE:
                        V = V + self.from_inside(part, node)
            self.join(V, "resid", layer)
        self.parts.embeddings = (V * frozen.embeddings[self.rows]).sum(-1)
        return self.parts

    def join(self, V: Tensor, stream: Stream, part: Part) -> Tensor:
        """Let the targets that read this stream join, in place."""
        for i in self.reading(stream, part):
            V[i, self.covectors[i].position] += self.covectors[i].vector
        return V

    def reading(self, stream: Stream, part: Part) -> list[int]:
        """Which covectors start at this stream."""
        return [i for i, c in enumerate(self.covectors) if (c.stream, c.layer) == (stream, part)]

    def through(self, part: Part, out: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        """What a branch's output adds goes into the parts; what passes to the stream below is returned.

        A coder does not stand between its own layer's output and a target that reads this very output: such targets
        go through the mixer itself.
        """
        coded, rows, parts = self._coded(part), self.rows, self.parts
        nodes = self._nodes(part)
        passing = None if nodes is None else 1 - nodes
        if coded is None:
            pulled = self.frozen.pull(part, out, rows, passing)
            self.keep(part, pulled)
            return pulled.below
        mine: Bool[Tensor, " n"] = torch.zeros(len(rows), dtype=torch.bool, device=out.device)
        mine[self.reading("out", part)] = True
        by_coder, by_mixer = out * ~mine[:, None, None], out * mine[:, None, None]
        below = torch.zeros_like(out)
        if self.frozen.is_split(part):
            below = self.across(coded.layer, out, by_coder, nodes)
        elif part in self.read_out:
            pulled = self.frozen.pull(part, by_mixer, rows, passing)
            below = pulled.below
            self.keep(part, pulled)
        else:
            for constants in (parts.biases, parts.initial):
                constants.setdefault(part, out.new_zeros(len(rows)))
        parts.features[coded.layer] = coded.feature_effects(by_coder, rows)
        parts.coder_biases[coded.layer] = coded.bias_effect(by_coder)
        parts.errors[coded.layer] = coded.error_effects(by_coder, rows)
        skip = coded.pull_skip(self.frozen, by_coder, rows)
        return below if skip is None else below + skip

    def across(
        self, layer: int, out: Float[Tensor, "n l d"], by_coder: Float[Tensor, "n l d"], nodes: Tensor | None
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
            self.carried[name] = self.carried[name] + covector if name in self.carried else covector

    def from_carried(self, part: Part) -> Float[Tensor, "n l d"] | float:
        """What all layers above pull from the stream below through a value that this branch made for them."""
        chain = self.frozen.chain(part)
        below: Tensor | float = 0.0
        for name, node in chain.gives.items():
            if name in self.carried:
                covector = self.carried.pop(name)
                self.parts.carried[name] = (covector * chain.values[node][self.rows]).sum(-1)
                pulled = self.frozen.pull_u(part, covector, self.rows)
                self.constants(part, pulled)
                below = below + pulled.below
        return below

    def constants(self, part: Part, pulled: Pulled) -> None:
        """Add what biases and the memory before the first position give."""
        parts = self.parts
        parts.biases[part] = parts.biases[part] + pulled.bias if part in parts.biases else pulled.bias
        parts.initial[part] = parts.initial[part] + pulled.initial if part in parts.initial else pulled.initial

    def keep(self, part: Part, pulled: Pulled) -> None:
        """Read a branch's share off."""
        chain, rows, nodes = self.frozen.chain(part), self.rows, self._nodes(part)
        if self.keep_heads:
            self.parts.heads[part] = pulled.at["u"] * chain.u[rows]
            self.parts.token_heads[part] = pulled.at["p"] * chain.p[rows]
        if nodes is not None:
            source, channel = nodes.nonzero(as_tuple=True)
            self.parts.node_heads[part] = (pulled.at["u"] * chain.u[rows])[:, source, channel]
        self.constants(part, pulled)
        self.carry(pulled)

    def from_inside(self, part: Part, node: Stream) -> Float[Tensor, "n l d"] | float:
        """What targets on a node of this branch pull from the stream below."""
        mine = self.reading(node, part)
        if not mine:
            return 0.0
        chain = self.frozen.chain(part)
        like = chain.values.get(node, chain.u)
        covector = like.new_zeros(len(self.covectors), *like.shape[1:])
        for i in mine:
            covector[i, self.covectors[i].position] = self.covectors[i].vector
        if node == "u":
            pulled = self.frozen.pull_u(part, covector, self.rows)
        else:
            pulled = chain.pull(covector, self.rows, start=node)
        self.constants(part, pulled)
        self.carry(pulled)
        return pulled.below

    def _coded(self, part: Part) -> CodedLayer | None:
        return self.frozen.coded.get(part) if isinstance(part, int) else None

    def _nodes(self, part: Part) -> Tensor | None:
        return self.nodes.get(part) if isinstance(part, int) else None
