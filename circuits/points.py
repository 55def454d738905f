"""Covectors going down where nothing moves between positions of the stream: each stays at the few that it started at.

So it is with a coder in place of every mixer's output, or of every mixer's write. A covector is then d numbers at its
own position (at the K taps of a convolution, if it is on a write; at those that a coder reads, if it reads a window),
and not l d. Where it meets a block's coder it meets what stands at these positions; where it meets a write dictionary,
a row of the scan's attention matrix says what it reads of each source, and paths end there.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.descent import Descent, depth
from circuits.frozen_model import FrozenModel
from circuits.parts import Parts
from circuits.targets import Covector, Stream
from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.linear import Conv, Mix, Rows
from hooked_mamba.frozen.places import Part

STARTS = ("resid", "in", "u")
"""Streams at which covectors may start."""


def stays(frozen: FrozenModel, covectors: list[Covector]) -> bool:
    """Whether all that is below these covectors keeps them at their positions."""
    if frozen.rule.name != "none" or any(covector.stream not in STARTS for covector in covectors):
        return False
    if frozen.model.handed_on():
        return False
    return all(_stays(frozen, part) for layer in range(frozen.n_layers) for part in frozen.parts(layer))


def _stays(frozen: FrozenModel, part: Part) -> bool:
    coded = frozen.coded.get(part)
    if coded is not None and coded.node == "out":
        return coded.mode == "block" and (coded.coder.cfg.window == 1 or coded.coder.W_skip is None)
    chain = frozen.chain(part)
    shifts = reach(chain.between(until="p")) > 1
    if coded is not None:
        return not shifts and chain.bypass is None and coded.coder.W_skip is None
    return chain.mix is None and not shifts and reach(chain.pieces) == 1


def reach(pieces: tuple) -> int:
    """Taps of the longest convolution among them."""
    return max((piece.taps.shape[1] for piece in pieces if isinstance(piece, Conv)), default=1)


def by_depth(covectors: list[Covector], most: int) -> list[list[int]]:
    """Batches of covectors, the highest first, as places among all."""
    order = sorted(range(len(covectors)), key=lambda i: -depth(covectors[i]))
    return [order[i : i + most] for i in range(0, len(order), most)]


class PointDescent(Descent):
    """A descent whose streams have w positions for each covector: its own, the last of them, and those before it.

    Constants of the run are taken at (row, position) pairs, n w, in the place of whole rows, n l.
    """

    def __init__(
        self, frozen: FrozenModel, covectors: list[Covector], rows: Int[Tensor, " n"], keep_heads: bool
    ) -> None:
        super().__init__(frozen, covectors, rows, set(), keep_heads, {})
        inside = {covector.layer for covector in covectors if covector.stream == "u"}
        reaches = [reach(frozen.chain(part).pieces) for part in inside]
        self.window = max([*reaches, *(covector.width for covector in covectors)])
        at = torch.tensor([covector.position for covector in covectors], device=rows.device)
        before = torch.arange(1 - self.window, 1, device=rows.device)
        self.places: Int[Tensor, "n w"] = at[:, None] + before
        """Negative ones are before the first position."""
        self.positions = self.places.clamp(min=0)

    def start(self) -> Float[Tensor, "n w d"]:
        bottom = self.frozen.resid(0)
        return bottom.new_zeros(0, self.window, bottom.shape[-1])

    def started(self, n: int) -> Rows:
        return self.all_rows[:n, None], self.positions[:n]

    def join(self, V: Tensor, stream: Stream, part: Part) -> Tensor:
        for i in self.reading(stream, part):
            V[i, -self.covectors[i].width :] += self.covectors[i].vector
        return V

    def spread(self, at_points: Float[Tensor, "n w ..."]) -> Float[Tensor, "n l ..."]:
        n, _, *more = at_points.shape
        whole = at_points.new_zeros(n, self.frozen.length, *more)
        each = torch.arange(n, device=whole.device)[:, None].expand(-1, self.window)
        return whole.index_put_((each, self.positions[:n]), at_points, accumulate=True)

    def through(self, part: Part, out: Float[Tensor, "n w d"]) -> Float[Tensor, "n w i"]:
        coded, chain, n = self._coded(part), self.frozen.chain(part), len(out)
        if coded is None or coded.node != "u" or chain.mix is None:
            return super().through(part, out)
        pulled = chain.pull(out, self.rows, until="y")
        vy, rows = pulled.at["y"], self.all_rows[:n]
        bias, initial = pulled.bias, pulled.initial
        for piece in chain.between("u", "y"):
            if isinstance(piece, Mix):
                if chain.h0 is not None and bool(chain.h0.any()):
                    remembered = piece.apply(torch.zeros_like(chain.u))
                    initial = initial + (vy * remembered[self.rows]).sum((1, 2))
            else:  # a bias behind the scan
                back = piece.of(self.rows).pull(vy)
                bias = bias if back.bias is None else bias + back.bias
        self.add_constants(part, bias, initial)
        self.read_off(coded, self.sources(chain, vy, rows), rows, whole=True)
        return vy.new_zeros(()).expand(n, self.window, chain.norm.factor.shape[-1])

    def sources(self, chain: Chain, vy: Float[Tensor, "n w E"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n l E"]:
        """Covectors on what is read of memory as ones on what was written into it, at all sources."""
        scan, n, l = chain.scan, len(vy), self.frozen.length
        meets: Bool[Tensor, "n w"] = (vy != 0).any(-1) & (self.places[:n] >= 0)
        queries = self.positions[:n][meets].unique().tolist()
        ub = vy.new_zeros(n, l, scan.n_lanes, scan.width)
        if not queries:
            return ub.flatten(2)
        alpha = scan.rows(queries).permute(0, 2, 3, 1).to(vy.dtype).contiguous().unsqueeze(-1)  # b q l H 1
        v, place_of = vy.unflatten(2, (scan.n_lanes, -1)), {t: i for i, t in enumerate(queries)}
        for i, slot in meets.nonzero().tolist():
            t = int(self.positions[i, slot])
            ub[i, : t + 1].addcmul_(alpha[rows[i], place_of[t], : t + 1], v[i, slot])
        return ub.flatten(2)

    def from_inside(self, part: Part, node: Stream) -> Float[Tensor, "n w d"] | float:
        mine = self.reading(node, part)
        if not mine:
            return 0.0
        chain = self.frozen.chain(part)
        n = len(self.rows[0])
        covector = chain.u.new_zeros(n, self.window, chain.width)
        for i in mine:
            covector[i, -self.covectors[i].width :] = self.covectors[i].vector
        above = chain.pull(covector, self.rows, start="u", until="p")
        pb, earlier = above.below, self.places[:n] < 0
        initial = above.initial
        for piece in chain.between("p", "u"):
            if isinstance(piece, Conv) and piece.history.shape[1]:  # slot -1 is the last of its history
                at = (self.places[:n] + piece.history.shape[1]).clamp(0, piece.history.shape[1] - 1)
                remembered = piece.history[self.all_rows[:n, None], at].to(pb.dtype)
                initial = initial + (pb * remembered * earlier.unsqueeze(-1)).sum((1, 2))
        pulled = chain.pull(pb * ~earlier.unsqueeze(-1), self.rows, start="p")
        self.add_constants(part, above.bias + pulled.bias, initial + pulled.initial)
        return pulled.below

    def run(self) -> Parts:
        found = super().run()
        found.embeddings = self.spread(found.embeddings)
        return found
