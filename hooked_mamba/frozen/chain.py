"""Pieces composed: a branch from the stream below it to what it adds, with named places between.

    stream -> norm -> W_x -> p -> convolution, sigma -> u -> scan -> y -> gain -> W_o -> out

p is each channel's own input, u the value that enters memory, y what is read out of it. Where a branch has no
convolution p is u, where it has no memory u is y. A covector can be read, scaled or started at each of them, and so
can a change that is pushed forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooked_mamba.frozen.linear import Gain, Mix, Piece, Plus, Project, Rows
from hooked_mamba.frozen.routed import Routing, of_experts
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.frozen.tokens import TokenPath

NODES = ("p", "u", "y")
"""The named places, in the order of the forward pass."""

Shares = Mapping[str, Float[Tensor, "*n l E"]]
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
    carried: Mapping[str, Float[Tensor, "n l E"]] = field(default_factory=dict, kw_only=True)
    """Name -> on a value that another layer made and this one mixes into u."""


@dataclass(frozen=True)
class Bypass:
    """A second way from one node to another, beside the pieces between them: RWKV-7's bonus."""

    start: str
    end: str
    gain: Gain


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
    bypass: Bypass | None = None
    """A second way beside some of the pieces."""
    takes: Mapping[str, Gain] = field(default_factory=dict)
    """Name of a value that another layer made -> the factor with which it is added to u."""
    gives: Mapping[str, str] = field(default_factory=dict)
    """Name of a value that other layers take -> the node here at which it is made."""
    routing: Routing | None = None
    """Which experts the channels belong to; None where there are no experts."""
    unit: int = 1
    """Channels side by side that act as one: those of an attention head, the neurons of a chosen expert."""

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
    def n_units(self) -> int:
        """Units U: channels, attention heads, neurons, or experts."""
        return self.width // self.unit if self.routing is None else self.routing.n_experts

    def of_units(self, values: Shaped[Tensor, "l U"], rows: Any = 0) -> Shaped[Tensor, "*n l E"]:
        """A number of each unit as one of each of its channels; `rows`: of the run, whose choices of experts differ."""
        if self.routing is not None:
            chosen = self.routing.chosen[rows]
            values = values.expand(*chosen.shape[:-1], -1).gather(-1, chosen)
        return values if self.unit == 1 else values.repeat_interleave(self.unit, -1)

    def by_unit(self, values: Float[Tensor, "n l E"], rows: Rows) -> Float[Tensor, "n l U"]:
        """Sums over the channels of each unit."""
        if self.routing is not None:
            return of_experts(values, self.routing, rows)
        return values if self.unit == 1 else values.unflatten(-1, (-1, self.unit)).sum(-1)

    def channels_of(self, unit: int, row: int, position: int) -> list[int]:
        """The channels of a unit; of an expert there are none where it was not chosen."""
        slots = (
            [unit] if self.routing is None else (self.routing.chosen[row, position] == unit).nonzero()[:, 0].tolist()
        )
        return [channel for slot in slots for channel in range(slot * self.unit, (slot + 1) * self.unit)]

    def on_lanes(self, covector: Float[Tensor, "*n f"]) -> Float[Tensor, "*n E"]:
        """A covector on the site of u as one on u: of values that several lanes share, on the first of them."""
        shared = self.width // covector.shape[-1]
        if shared == 1:
            return covector
        heads = covector.unflatten(-1, (-1, self.scan.width))
        spread = heads.new_zeros(*heads.shape[:-1], shared, heads.shape[-1])
        spread = torch.cat([heads.unsqueeze(-2), spread[..., 1:, :]], -2)
        return spread.flatten(-3)

    def on_site(self, covector: Float[Tensor, "*n E"], width: int) -> Float[Tensor, "*n f"]:
        """A covector on u as one on its site of so many numbers: what lanes share, they add up on."""
        shared = self.width // width
        if shared == 1:
            return covector
        return covector.unflatten(-1, (-1, shared, self.scan.width)).sum(-2).flatten(-2)

    def of_site(self, value: Float[Tensor, "*n f"]) -> Float[Tensor, "*n E"]:
        """A value (or change) of the site of u as one of u."""
        shared = self.width // value.shape[-1]
        if shared == 1:
            return value
        return value.unflatten(-1, (-1, self.scan.width)).repeat_interleave(shared, -2).flatten(-2)

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
        return next(piece for piece in reversed(self.pieces) if isinstance(piece, Project))

    @property
    def input_bias(self) -> Float[Tensor, " E"] | float:
        """What p has without any stream."""
        before = self.between(until="p")
        first = next((i for i, piece in enumerate(before) if isinstance(piece, Project) and piece.b is not None), None)
        if first is None:
            return 0.0
        bias: Any = cast(Project, before[first]).b
        for piece in before[first + 1 :]:
            bias = piece.push(bias)
        return bias

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
        if not isinstance(self.pieces[-1], Project):
            return self.followed_by(Gain(self.u.new_tensor(factor)))
        W, b = self.output.W * factor, self.output.b
        return replace(self, pieces=(*self.pieces[:-1], Project(W, None if b is None else b * factor)))

    def up_to_u(self) -> Chain:
        """What makes u, as a branch of its own whose channels are one unit."""
        at = self.nodes["u"]
        nodes = {name: place for name, place in self.nodes.items() if place <= at}
        return Chain(self.pieces[:at], nodes, self.path, self.values, takes=self.takes, unit=self.width)

    def followed_by(self, piece: Piece) -> Chain:
        """The same with a step behind its output."""
        return replace(self, pieces=(*self.pieces, piece))

    # Backwards -------------------------------------------------------------------------------------------------

    def pull(
        self,
        v: Float[Tensor, "n l e"],
        rows: Rows,
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
        carried = self.carried(v, rows) if start == "u" else {}
        beside: Tensor | None = None
        bypass = self.bypass
        place = len(self.pieces) if start is None else self.nodes[start]
        met |= {} if start is None else {start: v}
        for i in reversed(range(0 if until is None else self.nodes[until], place)):
            if bypass is not None and i + 1 == self.nodes[bypass.end]:
                beside = bypass.gain.of(rows).pull(v).covector
            back = self.pieces[i].of(rows).pull(v)
            v = back.covector
            if beside is not None and bypass is not None and i == self.nodes[bypass.start]:
                v = v + beside
            biases += [] if back.bias is None else [back.bias]
            initial += [] if back.initial is None else [back.initial]
            for name in reversed([name for name, at in self.nodes.items() if at == i]):
                met[name] = v
                if through is not None and name in through:
                    v = v * through[name]
                if name == "u":
                    carried = self.carried(v, rows)
        none = v.new_zeros(len(v))
        # The lowest bias comes first: the order decides how the sum is rounded.
        bias = _summed([*biases[-1:], *biases[:-1]], none)
        return Pulled(v, met, bias, _summed(initial, none).to(none.dtype), carried=carried)

    def carried(self, v: Float[Tensor, "n l E"], rows: Rows) -> dict[str, Float[Tensor, "n l E"]]:
        """Covectors on u as ones on the values that other layers made."""
        return {name: gain.of(rows).pull(v).covector for name, gain in self.takes.items()}

    def pull_own(self, v: Float[Tensor, "n l d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l E"]:
        """The covector on p of what a position's own input gives it, and nothing from other positions."""
        return self.here().pull(v, rows, until="p").below

    def here(self) -> Chain:
        """The same with nothing moved between positions."""
        return replace(self, pieces=tuple(piece.here() for piece in self.pieces))

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
        beside: Tensor | None = None
        last = len(self.pieces) if until is None else self.nodes[until]
        for i in range(self.nodes[start] if start else 0, last):
            for name in [name for name, at in self.nodes.items() if at == i and name != start]:
                met[name] = delta
                if through is not None and name in through:
                    delta = delta * through[name]
                if add is not None and name in add:
                    delta = delta + add[name]
            delta, beside = self._step("push", i, delta, beside, rows)
        return delta, met

    def apply(self, x: Float[Tensor, "n l d"], given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The whole affine map of the stream, biases and memory included: the value at each node, and "out".

        Parameters
        ----------
        given
            Values that other layers made, by name; those absent are the run's own.
        """
        given = given or {}
        found: dict[str, Tensor] = {}
        beside: Tensor | None = None
        for i in range(len(self.pieces)):
            found |= {name: x for name, at in self.nodes.items() if at == i}
            taken = [name for name in self.takes if name in given]
            if isinstance(self.pieces[i], Plus) and taken:
                x = x + self.takes[taken[0]].push(given[taken[0]])
            else:
                x, beside = self._step("apply", i, x, beside)
        return found | {"out": x}

    def _step(
        self, step: Literal["push", "apply"], i: int, x: Tensor, beside: Tensor | None, rows: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """(what piece i makes of x, what waits on the second way)."""
        bypass = self.bypass
        if bypass is not None and i == self.nodes[bypass.start]:
            beside = (bypass.gain if rows is None else bypass.gain.of(rows)).push(x)
        piece = self.pieces[i] if rows is None else self.pieces[i].of(rows)
        x = piece.push(x) if step == "push" else piece.apply(x)
        if bypass is not None and beside is not None and i + 1 == self.nodes[bypass.end]:
            return x + beside, None
        return x, beside

    def of(self, rows: Any, scan_of: tuple[Chain, Any] | None = None) -> Chain:
        """The chain at n rows of the run; with `scan_of` the scan is that of another run, at rows of that."""
        pieces = [piece.of(rows) for piece in self.pieces]
        if scan_of is not None:
            other, others = scan_of
            pieces = [
                theirs.of(others) if isinstance(theirs, Mix) else mine
                for mine, theirs in zip(pieces, other.pieces, strict=True)
            ]
        bypass, takes = self.bypass, {name: gain.of(rows) for name, gain in self.takes.items()}
        if bypass is not None:
            gain = bypass.gain.of(rows) if scan_of is None else scan_of[0].bypass.gain.of(scan_of[1])  # type: ignore[union-attr]
            bypass = replace(bypass, gain=gain)
        return replace(self, pieces=tuple(pieces), bypass=bypass, takes=takes)

    def own(self) -> Float[Tensor, "b l E"]:
        """The factor by which each channel's own input p passes at its own position, up to the output's weights."""
        factor: Tensor | None = None
        for piece in reversed([piece for piece in self.between("p") if not isinstance(piece, Project)]):
            factor = piece.diagonal() if factor is None else factor * piece.diagonal()
        assert factor is not None  # sigma and taps are always there
        return factor

    def push_own(self, p: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What inputs p add to the output at their own position (no bias in it)."""
        return self.here().push(p, rows, start="p")[0]

    def push_across(self, p: Float[Tensor, "n l E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l d"]:
        """What inputs p add to the output at other positions than their own (no bias in it)."""
        return self.push(p, rows, start="p")[0] - self.push_own(p, rows)


def _summed(parts: list[Tensor], none: Tensor) -> Tensor:
    """The sum, in the order given."""
    total = none
    for i, part in enumerate(parts):
        total = part if i == 0 else total + part
    return total
