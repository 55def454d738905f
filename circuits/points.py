"""Covectors going down where nothing moves between positions: each stays at the one that it started at.

So it is with a coder in place of every mixer. A covector is then d numbers and not l d, and meets only the features,
the error and the embedding of its own position.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.descent import Descent
from circuits.frozen_model import FrozenModel
from circuits.parts import Parts
from circuits.targets import Covector, Stream
from hooked_mamba.frozen.linear import Rows
from hooked_mamba.frozen.run import Part


def stays(frozen: FrozenModel, covectors: list[Covector]) -> bool:
    """Whether all that is below these covectors keeps them at their positions."""
    if frozen.rule.name != "none" or any(covector.stream != "resid" for covector in covectors):
        return False
    return all(_stays(frozen, part) for layer in range(frozen.n_layers) for part in frozen.parts(layer))


def _stays(frozen: FrozenModel, part: Part) -> bool:
    if part in frozen.coded and not frozen.is_written(part):
        return not frozen.is_split(part)
    chain = frozen.chain(part)
    return chain.mix is None and not chain.takes and not chain.gives


class PointDescent(Descent):
    """A descent whose streams have one position for each covector: its own.

    Constants of the run are taken at (row, position) pairs, n 1, in the place of whole rows, n l.
    """

    def __init__(
        self, frozen: FrozenModel, covectors: list[Covector], rows: Int[Tensor, " n"], keep_heads: bool
    ) -> None:
        super().__init__(frozen, covectors, rows, set(), keep_heads, {})
        self.positions = torch.tensor([covector.position for covector in covectors], device=rows.device)

    def run(self) -> Parts:
        found = super().run()
        for part in fields(found):
            value = getattr(found, part.name)
            spread = {key: self.spread(one) for key, one in value.items()} if isinstance(value, dict) else None
            setattr(found, part.name, self.spread(value) if spread is None else spread)
        return found

    def start(self) -> Float[Tensor, "n 1 d"]:
        bottom = self.frozen.resid(0)
        return bottom.new_zeros(0, 1, bottom.shape[-1])

    def started(self, n: int) -> Rows:
        return self.all_rows[:n, None], self.positions[:n, None]

    def join(self, V: Tensor, stream: Stream, part: Part) -> Tensor:
        for i in self.reading(stream, part):
            V[i, 0] += self.covectors[i].vector
        return V

    def spread(self, at_point: Tensor) -> Tensor:
        """Numbers at each covector's own position, n 1 ..., as ones at all positions; others stay as they are."""
        if at_point.ndim < 2 or at_point.shape[1] != 1:
            return at_point
        n, _, *more = at_point.shape
        whole = at_point.new_zeros(n, self.frozen.length, *more)
        whole[torch.arange(n, device=whole.device), self.positions[:n]] = at_point[:, 0]
        return whole
