"""Covectors on their way down the frozen model.

1. From the last layer down, the targets that start at a layer join; V is the covector on the stream above it.
2. The layer's share is read off: heads, or features and error.
3. V' = V + what passes through the frozen mixer is the covector on the stream below.
4. At the bottom V meets the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.frozen_mixer import Pulled
from circuits.frozen_model import FrozenModel
from circuits.targets import Covector, Stream

PARTS = (
    "heads", "token_heads", "node_heads", "features", "coder_biases", "errors", "biases", "initial",
)  # fmt: skip
"""The parts that come by layer."""


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
        Whether to keep what each head adds.
    nodes
        Layer -> 1 at heads where paths end.
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
        self.parts: dict[str, Any] = {name: {} for name in PARTS}

    def run(self) -> dict[str, Any]:
        """The parts by name: "embeddings" n l, all others by layer."""
        frozen, cfg = self.frozen, self.frozen.model.cfg
        V = frozen.resid(0).new_zeros(len(self.covectors), frozen.length, cfg.d_model)
        self.join(V, "resid", cfg.n_layers)
        for layer in reversed(range(cfg.n_layers)):
            out = self.join(V.clone(), "out", layer)
            V = V + self.through(layer, out)
            V = V + self.from_inside(layer, "u") + self.from_inside(layer, "p")
            self.join(V, "resid", layer)
        self.parts["embeddings"] = (V * frozen.embeddings[self.rows]).sum(-1)
        return self.parts

    def join(self, V: Tensor, stream: Stream, layer: int) -> Tensor:
        """Let the targets that read this stream join, in place."""
        for i in self.reading(stream, layer):
            V[i, self.covectors[i].position] += self.covectors[i].vector
        return V

    def reading(self, stream: Stream, layer: int) -> list[int]:
        """Which covectors start at this stream."""
        return [i for i, c in enumerate(self.covectors) if (c.stream, c.layer) == (stream, layer)]

    def through(self, layer: int, out: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        """What a layer's output adds goes into the parts; what passes to the stream below is returned.

        A coder does not stand between its own layer's output and a target that reads this very output: such targets
        go through the mixer itself.
        """
        coded, rows, nodes = self.frozen.coded.get(layer), self.rows, self.nodes.get(layer)
        passing = None if nodes is None else 1 - nodes
        if coded is None:
            pulled = self.frozen.pull(layer, out, rows, passing)
            self.keep(layer, pulled, pulled.pb)
            return pulled.below
        mine: Bool[Tensor, " n"] = torch.zeros(len(rows), dtype=torch.bool, device=out.device)
        mine[self.reading("out", layer)] = True
        by_coder, by_mixer = out * ~mine[:, None, None], out * mine[:, None, None]
        below = torch.zeros_like(out)
        if coded.mode == "hybrid":
            below = self.across(layer, out, by_coder, nodes)
        elif layer in self.read_out:
            pulled = self.frozen.pull(layer, by_mixer, rows, passing)
            below = pulled.below
            self.keep(layer, pulled, pulled.pb)
        else:
            self.parts["biases"][layer] = self.parts["initial"][layer] = out.new_zeros(len(rows))
        self.parts["features"][layer] = coded.feature_effects(by_coder, rows)
        self.parts["coder_biases"][layer] = coded.bias_effect(by_coder)
        self.parts["errors"][layer] = coded.error_effects(by_coder, rows)
        skip = coded.pull_skip(self.frozen, by_coder, rows)
        return below if skip is None else below + skip

    def across(
        self, layer: int, out: Float[Tensor, "n l d"], by_coder: Float[Tensor, "n l d"], nodes: Tensor | None
    ) -> Float[Tensor, "n l d"]:
        """A hybrid layer's cross-token part, whose heads are those of tokens: paths end at p where they are nodes."""
        mixer, rows = self.frozen.mixer(layer), self.rows
        pulled = mixer.pull(out, rows)
        pb = pulled.pb - mixer.pull_local(by_coder, rows)
        if self.keep_heads:
            self.parts["heads"][layer] = pulled.ub * mixer.u[rows]
            self.parts["token_heads"][layer] = pb * mixer.p[rows]
        bias = pulled.bias
        if nodes is not None:
            ending = pb * nodes
            source, channel = nodes.nonzero(as_tuple=True)
            self.parts["node_heads"][layer] = (ending * mixer.p[rows])[:, source, channel]
            pb, bias = pb - ending, bias - mixer.pull_p(ending, rows)[1]
        self.parts["biases"][layer], self.parts["initial"][layer] = bias, pulled.initial
        return mixer.pull_p(pb, rows)[0]

    def keep(self, layer: int, pulled: Pulled, pb: Float[Tensor, "n l E"]) -> None:
        """Read a mixer's share off."""
        mixer, rows, nodes = self.frozen.mixer(layer), self.rows, self.nodes.get(layer)
        if self.keep_heads:
            self.parts["heads"][layer] = pulled.ub * mixer.u[rows]
            self.parts["token_heads"][layer] = pb * mixer.p[rows]
        if nodes is not None:
            source, channel = nodes.nonzero(as_tuple=True)
            self.parts["node_heads"][layer] = (pulled.ub * mixer.u[rows])[:, source, channel]
        self.parts["biases"][layer], self.parts["initial"][layer] = pulled.bias, pulled.initial

    def from_inside(self, layer: int, stream: Stream) -> Float[Tensor, "n l d"] | float:
        """What targets on this layer's u or p pull from the stream below."""
        mine = self.reading(stream, layer)
        if not mine:
            return 0.0
        mixer = self.frozen.mixer(layer)
        covector = mixer.u.new_zeros(len(self.covectors), *mixer.u.shape[1:])
        for i in mine:
            covector[i, self.covectors[i].position] = self.covectors[i].vector
        if stream == "p":
            below, bias = mixer.pull_p(covector, self.rows)
        else:
            pulled = self.frozen.pull_u(layer, covector, self.rows)
            below, bias = pulled.below, pulled.bias
            self.parts["initial"][layer] = self.parts["initial"][layer] + pulled.initial
        self.parts["biases"][layer] = self.parts["biases"][layer] + bias
        return below
