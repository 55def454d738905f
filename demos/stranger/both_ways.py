"""The linear form of a scan that is read from both ends: hidden attention with two triangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.ops.interface import ScanOut


@dataclass(frozen=True)
class BothWays(HeldScan):
    """One scan read from the front and from the back: alpha has both triangles, and the diagonal twice."""

    ahead: SelectiveScan

    @property
    def u(self) -> Tensor:  # type: ignore[override]
        return self.ahead.u

    @property
    def back(self) -> SelectiveScan:
        """The scan over the reversed text."""
        u, dt, B, C = (part.flip(1) for part in (self.ahead.u, self.ahead.dt, self.ahead.B, self.ahead.C))
        return replace(self.ahead, u=u, dt=dt, B=B, C=C)

    def over(self, u: Tensor, rows: Any = None) -> BothWays:
        return BothWays(self.ahead.over(u, rows))

    def out(self, h0: Any = None, *, states_at: Any = None, edits: Any = None, frozen: bool = False) -> ScanOut:
        ahead = self.ahead.out(h0, states_at=states_at, edits=edits, frozen=frozen)
        return ahead._replace(y=ahead.y + self.back.out(frozen=frozen).y.flip(1))

    def rows(self, queries: Sequence[int] | None = None, **options: Any) -> Tensor:
        at = [t % self.length for t in (range(self.length) if queries is None else queries)]
        mirrored = self.back.rows([self.length - 1 - t for t in at], **options).flip(3)
        return self.ahead.rows(at, **options) + mirrored

    def skip(self) -> Tensor:
        return 2 * self.ahead.D
