"""Pieces of a branch that are affine in its value once everything else is held at a run's numbers.

Each takes a value forwards, `push`, and a covector backwards, `pull` (the vector-Jacobian product). What its bias and
the memory before the first position add to a covector comes out of `pull` as numbers of their own, so that sums stay
complete. Constants have the rows b of a run in front; `of(rows)` takes those of n targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.layers import has_no_hook
from hooked_mamba.ops.products import linear, times

Rows = Int[Tensor, " n"] | tuple[Int[Tensor, "n 1"], Int[Tensor, "n w"]]
"""Rows of a run that n targets belong to; or (row, position) pairs, of targets that have w positions in a row each."""


class Back(NamedTuple):
    """What a covector on a piece's output becomes."""

    covector: Tensor
    """On its input, n l i."""
    bias: Float[Tensor, " n"] | None = None
    """What the piece's bias adds; None without one."""
    initial: Float[Tensor, " n"] | None = None
    """What memory before the first position adds; None without any."""


class Piece(ABC):
    """One affine step."""

    def of(self, rows: Any) -> Piece:
        """Its constants at some rows (or another index of rows and positions)."""
        return self

    @abstractmethod
    def push(self, x: Tensor) -> Tensor:
        """The linear part: a change of the input to one of the output."""

    def apply(self, x: Tensor) -> Tensor:
        """The whole step: bias and memory included."""
        return self.push(x)

    @abstractmethod
    def pull(self, v: Tensor) -> Back:
        """A covector on the output as one on the input."""

    def here(self) -> Piece:
        """What it does within one position, with nothing from others; default: it is that already."""
        return self

    def diagonal(self) -> Tensor:
        """The factor by which a channel's value passes at its own position, b l e or what broadcasts to it.

        Raises
        ------
        ValueError
            The piece mixes channels.
        """
        raise ValueError(f"{type(self).__name__} mixes channels: it has no factor for each")


@dataclass(frozen=True)
class Project(Piece):
    """W x + b."""

    W: Float[Tensor, "o i"]
    b: Float[Tensor, " o"] | None = None

    def push(self, x: Tensor) -> Tensor:
        return linear(x, self.W)

    def apply(self, x: Tensor) -> Tensor:
        return self.push(x) if self.b is None else self.push(x) + self.b

    def pull(self, v: Tensor) -> Back:
        return Back(times(v, self.W), None if self.b is None else (v @ self.b).sum(1))


@dataclass(frozen=True)
class Gain(Piece):
    """A factor for each number: a gate, a norm's w / scale, 0 at padding."""

    factor: Float[Tensor, "..."]
    """b l e, or what broadcasts to it; e where it is the same in all rows."""

    def of(self, rows: Any) -> Gain:
        same = self.factor.ndim < 2 or (len(self.factor) == 1 and isinstance(rows, Tensor))
        return self if same else Gain(self.factor[rows])

    def push(self, x: Tensor) -> Tensor:
        return x * self.factor

    def pull(self, v: Tensor) -> Back:
        return Back(v * self.factor)

    def diagonal(self) -> Tensor:
        return self.factor


@dataclass(frozen=True)
class Centred(Gain):
    """A LayerNorm with its divisor held: (x - mean x) * factor + bias, over all channels or over equal groups."""

    bias: Float[Tensor, " e"]
    groups: int = 1

    def of(self, rows: Any) -> Centred:
        return Centred(self.factor[rows], self.bias, self.groups)

    def push(self, x: Tensor) -> Tensor:
        return centred(x, self.groups) * self.factor

    def apply(self, x: Tensor) -> Tensor:
        return self.push(x) + self.bias

    def pull(self, v: Tensor) -> Back:
        bias = (v @ self.bias.to(v.dtype)).sum(1) if v.ndim == 3 else None
        return Back(centred(v * self.factor, self.groups), bias)

    def diagonal(self) -> Tensor:
        return Piece.diagonal(self)


def centred(x: Float[Tensor, "... e"], groups: int = 1) -> Float[Tensor, "... e"]:
    """x without its mean, over all channels or over each of equal groups."""
    grouped = x.unflatten(-1, (groups, -1))
    return (grouped - grouped.mean(-1, keepdim=True)).flatten(-2)


def held_norm(norm: Any, scale: Float[Tensor, "b l 1"], factor: float | int | None = None) -> Gain:
    """A norm of a block as a piece, with its divisor at a run's numbers.

    Parameters
    ----------
    norm
        RMSNorm or LayerNorm.
    scale
        The divisor.
    factor
        Of what the norm gives; None: 1.
    """
    has_no_hook(norm, "a norm")
    weight = norm.weight.detach()
    weight = (weight.to(scale.dtype) if factor is None else weight.to(scale.dtype) * factor) / scale
    bias = getattr(norm, "bias", None)
    if bias is None:
        return Gain(weight)
    bias = bias.detach().to(scale.dtype)
    return Centred(weight, bias if factor is None else bias * factor)


@dataclass(frozen=True)
class Plus(Piece):
    """Something held is added, which is followed on a way of its own."""

    value: Float[Tensor, "b l e"]

    def of(self, rows: Any) -> Plus:
        return Plus(self.value[rows])

    def push(self, x: Tensor) -> Tensor:
        return x

    def apply(self, x: Tensor) -> Tensor:
        return x + self.value

    def pull(self, v: Tensor) -> Back:
        return Back(v)

    def diagonal(self) -> Tensor:
        return torch.ones_like(self.value)


@dataclass(frozen=True)
class Offset(Piece):
    """x + b, the b counting as a bias."""

    b: Float[Tensor, " e"]

    def push(self, x: Tensor) -> Tensor:
        return x

    def apply(self, x: Tensor) -> Tensor:
        return x + self.b

    def pull(self, v: Tensor) -> Back:
        return Back(v, (v @ self.b).sum(1))

    def diagonal(self) -> Tensor:
        return torch.ones_like(self.b)


@dataclass(frozen=True)
class Conv(Piece):
    """A causal depthwise convolution: sum_k taps[K-1-k] x_{t-k} + bias."""

    taps: Float[Tensor, "E K"]
    bias: Float[Tensor, " E"]
    history: Float[Tensor, "b k E"]
    """The K - 1 inputs before the first position."""
    within: bool = False
    """Whether values are at a few positions in a row, all that is read being among them."""

    def of(self, rows: Any) -> Conv:
        if isinstance(rows, tuple):  # pairs of rows and positions
            return Conv(self.taps, self.bias, self.history[rows[0][:, 0]], within=True)
        return Conv(self.taps, self.bias, self.history[rows])

    def push(self, x: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
        return causal_mix(self.taps, x)

    def apply(self, x: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
        return ops.causal_conv1d(x, self.taps.unsqueeze(1), self.bias, history=self.history.to(x.dtype))

    def pull(self, v: Float[Tensor, "n l E"]) -> Back:
        K = self.taps.shape[1]
        back = ops.causal_conv1d(F.pad(v, (0, 0, 0, K - 1)), self.taps.flip(1).unsqueeze(1), None)
        initial = v.new_zeros(len(v))
        for k in range(1, 1 if self.within else K):
            early = v[:, :k]  # which read the input k positions before them, before the first position
            past = self.history[:, K - 1 - k :][:, : early.shape[1]]
            initial = initial + (early * self.taps[:, K - 1 - k] * past).flatten(1).sum(1)
        return Back(back, (v @ self.bias).sum(1), initial)

    def here(self) -> Gain:
        return Gain(self.diagonal())

    def diagonal(self) -> Tensor:
        return self.taps[:, -1]


def causal_mix(taps: Float[Tensor, "E K"], x: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
    """sum_k taps[K-1-k] x_{t-k}, with nothing before the first position."""
    return ops.causal_conv1d(F.pad(x, (0, 0, taps.shape[1] - 1, 0)), taps.unsqueeze(1), None)


@dataclass(frozen=True)
class Mix(Piece):
    """Values moved between positions by a held scan (or pattern)."""

    scan: HeldScan
    h0: Float[Tensor, "b ..."] | None
    """The state before the first position."""
    rows: Any = None

    def of(self, rows: Any) -> Mix:
        return Mix(self.scan, self.h0, rows)  # taken when it runs: the scan's own input is mostly not needed

    def push(self, x: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
        return self._over(x).out().y.flatten(2)

    def apply(self, x: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
        return self._over(x).out(self._h0()).y.flatten(2)

    def pull(self, v: Float[Tensor, "n l E"]) -> Back:
        h0 = self._h0()
        covector, at_h0 = self.scan.pull(v, h0, self.rows)
        if h0 is None or at_h0 is None:
            return Back(covector)
        return Back(covector, None, (at_h0 * h0).flatten(1).sum(1))

    def here(self) -> Gain:
        return Gain(self.diagonal())

    def diagonal(self) -> Tensor:
        return self.own() + self.skip()

    def own(self) -> Float[Tensor, "b l E"]:
        """What a channel reads of what it has just written."""
        u = self.scan.values
        return self.scan.diagonal(include_skip=False).repeat_interleave(self.scan.width, 2).to(u.dtype)

    def skip(self) -> Float[Tensor, "*positions E"]:
        """What a channel passes on beside the state."""
        u = self.scan.values
        return self.scan.skip().repeat_interleave(self.scan.width, -1).to(u.dtype)

    def _over(self, x: Tensor) -> HeldScan:
        return self.scan.over(x.unflatten(2, (self.scan.n_lanes, -1)), self.rows)

    def _h0(self) -> Tensor | None:
        return self.h0 if self.h0 is None or self.rows is None else self.h0[self.rows]
