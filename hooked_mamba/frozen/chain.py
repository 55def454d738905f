"""Pieces composed: a branch from the stream below it to what it adds, with named places between.

    stream -> norm -> W_x -> p -> convolution, sigma -> u -> scan -> y -> gain -> W_o -> out

p is each channel's own input, u the value that enters memory, y what is read out of it. Where a branch has no
convolution p is u, where it has no memory u is y. A covector can be read, scaled or started at each of them, and so
can a change that is pushed forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.frozen.linear import Gain, Mix, Piece, Project
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.frozen.tokens import TokenPath

NODES = ("p", "u", "y")
"""The named places, in the order of the forward pass."""

Shares = Mapping[str, Float[Tensor, "l E"]]
"""Node -> what share passes on at each position and channel: 0 stops it."""


@dataclass(frozen=True)
class Pulled:
    """What a covector on a branch's output becomes: n targets, each on one row of the batch."""

    below: Float[Tensor, "n l d"]
    """On the stream entering the block, without the covector itself."""
    at: Mapping[str, Float[Tensor, "n l E"]]
    """Node -> the covector there, before any share is taken: a unit at (position, channel) adds so much."""
    bias: Float[Tensor, " n"]
    """What biases add."""
    initial: Float[Tensor, " n"]
    """What memory before the first position adds."""


@dataclass(frozen=True)
class Chain:
    """One branch at a run."""

    pieces: tuple[Piece, ...]
    nodes: Mapping[str, int]
    """Name -> the piece that reads this place; in the order of the forward pass."""
    path: TokenPath
    """From p to u."""
    values: Mapping[str, Float[Tensor, "b l E"]] = field(default_factory=dict)
    """Node -> what the run had there."""

    # What it is made of ----------------------------------------------------------------------------------------

    @property
    def p(self) -> Float[Tensor, "b l E"]:
        """The channels' own inputs."""
        return self.values["p"]

    @property
    def u(self) -> Float[Tensor, "b l E"]:
        """The values that enter memory."""
        return self.values["u"]

    @property
    def width(self) -> int:
        """Channels E."""
        return self.u.shape[-1]

    @property
    def mix(self) -> Mix | None:
        """What moves values between positions; None of a branch that does not."""
        return next((piece for piece in self.pieces if isinstance(piece, Mix)), None)

    @property
    def scan(self) -> HeldScan:
        """The held scan.

        Raises
        ------
        ValueError
            The branch moves nothing between positions.
        """
        if self.mix is None:
            raise ValueError("this branch has no scan: it moves nothing between positions")
        return self.mix.scan

    @property
    def h0(self) -> Tensor | None:
        """The scan's state before the first position."""
        return None if self.mix is None else self.mix.h0

    @property
    def norm(self) -> Gain:
        """The norm that the branch reads the stream through."""
        return cast(Gain, self.pieces[0])

    @property
    def output(self) -> Project:
        """What writes into the stream."""
        return cast(Project, self.pieces[-1])

    @property
    def input_bias(self) -> Float[Tensor, " E"] | float:
        """What p has without any stream."""
        return next((piece.b for piece in self.pieces if isinstance(piece, Project) and piece.b is not None), 0.0)

    def between(self, start: str | None = None, until: str | None = None) -> tuple[Piece, ...]:
        """The pieces from one node (None: the stream) to another (None: the output)."""
        return self.pieces[self.nodes[start] if start else 0 : self.nodes[until] if until else len(self.pieces)]

    def replaced(self, start: str, until: str, pieces: tuple[Piece, ...]) -> Chain:
        """Other pieces between two nodes."""
        first, last = self.nodes[start], self.nodes[until]
        moved = {
            name: place if place <= first and name != until else place + len(pieces) - (last - first)
            for name, place in self.nodes.items()
        }
        return replace(self, pieces=(*self.pieces[:first], *pieces, *self.pieces[last:]), nodes=moved)

    def with_output(self, factor: float) -> Chain:
        """The same with its output times a factor."""
        W, b = self.output.W * factor, self.output.b
        return replace(self, pieces=(*self.pieces[:-1], Project(W, None if b is None else b * factor)))

    # Backwards -------------------------------------------------------------------------------------------------

    def pull(
        self,
        v: Float[Tensor, "n l e"],
        rows: Int[Tensor, " n"],
        through: Shares | None = None,
        *,
        start: str | None = None,
        until: str | None = None,
    ) -> Pulled:
        """Take covectors on the output back to the stream entering the block.

        Parameters
        ----------
        v
            One for each target.
        rows
            The row of the batch that each target belongs to.
        through
            Shares at nodes. Channels that are nodes of their own stop here, with 0: `at` still holds what they get;
            below, what passes.
        start
            A node, if the covectors are on its value and not on the output.
        until
            A node to end at: `below` is then the covector there.
        """
        met: dict[str, Tensor] = {}
        biases: list[Tensor] = []
        initial: list[Tensor] = []
        place = len(self.pieces) if start is None else self.nodes[start]
        met |= {} if start is None else {start: v}
        for i in reversed(range(0 if until is None else self.nodes[until], place)):
            back = self.pieces[i].of(rows).pull(v)
            v = back.covector
            biases += [] if back.bias is None else [back.bias]
            initial += [] if back.initial is None else [back.initial]
            for name in reversed([name for name, at in self.nodes.items() if at == i]):
                met[name] = v
                if through is not None and name in through:
                    v = v * through[name]
        none = v.new_zeros(len(v))
        # The lowest bias comes first: the order decides how the sum is rounded.
        return Pulled(v, met, _summed([*biases[-1:], *biases[:-1]], none), _summed(initial, none).to(none.dtype))

    def pull_own(self, v: Float[Tensor, "n l d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l E"]:
        """The covector on p of what a position's own input gives it, and nothing from other positions."""
        return self.output.pull(v).covector * self.own()[rows]

    # Forwards --------------------------------------------------------------------------------------------------

    def push(
        self,
        delta: Float[Tensor, "n l e"],
        rows: Int[Tensor, " n"],
        through: Shares | None = None,
        add: Mapping[str, Float[Tensor, "n l E"]] | None = None,
        *,
        start: str | None = None,
        until: str | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forwards what :meth:`pull` takes back: a change of the stream to one of the output.

        Parameters
        ----------
        delta
            The change, of the stream entering the block or of the value at `start`.
        through
            As in :meth:`pull`: channels with 0 hold their value.
        add
            Node -> a change on top; it passes whatever `through` says.
        start, until
            Nodes to begin and to end at.

        Returns
        -------
        Tensor, dict
            The change of the output (or at `until`), and at the nodes on the way, before shares and additions.
        """
        met: dict[str, Tensor] = {}
        last = len(self.pieces) if until is None else self.nodes[until]
        for i in range(self.nodes[start] if start else 0, last):
            for name in [name for name, at in self.nodes.items() if at == i and name != start]:
                met[name] = delta
                if through is not None and name in through:
                    delta = delta * through[name]
                if add is not None and name in add:
                    delta = delta + add[name]
            delta = self.pieces[i].of(rows).push(delta)
        return delta, met

    def apply(self, x: Float[Tensor, "n l d"]) -> dict[str, Tensor]:
        """The whole affine map of the stream, biases and memory included: the value at each node, and "out"."""
        found: dict[str, Tensor] = {}
        for i, piece in enumerate(self.pieces):
            found |= {name: x for name, at in self.nodes.items() if at == i}
            x = piece.apply(x)
        return found | {"out": x}

    def of(self, rows: Any, scan_of: tuple[Chain, Any] | None = None) -> Chain:
        """The chain at n rows of the run; with `scan_of` the scan is that of another run, at rows of that."""
        pieces = [piece.of(rows) for piece in self.pieces]
        if scan_of is not None:
            other, others = scan_of
            pieces = [
                theirs.of(others) if isinstance(theirs, Mix) else mine
                for mine, theirs in zip(pieces, other.pieces, strict=True)
            ]
        return replace(self, pieces=tuple(pieces))

    def own(self) -> Float[Tensor, "b l E"]:
        """The factor by which each channel's own input p passes at its own position, up to the output's weights."""
        factor: Tensor | None = None
        for piece in reversed(self.between("p")[:-1]):
            factor = piece.diagonal() if factor is None else factor * piece.diagonal()
        assert factor is not None  # sigma and taps are always there
        return factor

    def push_own(self, p: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What inputs p add to the output at their own position (no bias in it)."""
        return self.output.push(p * self.own()[rows])

    def push_across(self, p: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What inputs p add to the output at other positions than their own (no bias in it)."""
        written = p
        for piece in self.between("p")[:-1]:
            written = piece.of(rows).push(written)
        return self.output.push(written - p * self.own()[rows])


def _summed(parts: list[Tensor], none: Tensor) -> Tensor:
    """The sum, in the order given."""
    total = none
    for i, part in enumerate(parts):
        total = part if i == 0 else total + part
    return total
