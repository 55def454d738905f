"""Steps of a mixture of experts with its routing held: at each position the weights of the experts chosen there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.frozen.linear import Back, Piece, Rows


@dataclass(frozen=True)
class IntoExperts(Piece):
    """x -> W_e x of each chosen expert e, side by side."""

    W: Float[Tensor, "X o i"]
    chosen: Int[Tensor, "b l k"]

    def of(self, rows: Any) -> IntoExperts:
        return replace(self, chosen=self.chosen[rows])

    def push(self, x: Float[Tensor, "n l i"]) -> Float[Tensor, "n l ko"]:
        return each(self.W, self.chosen, x)

    def pull(self, v: Float[Tensor, "n l ko"]) -> Back:
        return Back(summed(self.W.transpose(1, 2), self.chosen, v))


@dataclass(frozen=True)
class OutOfExperts(Piece):
    """sum_e W_e x_e over the chosen experts."""

    W: Float[Tensor, "X o i"]
    chosen: Int[Tensor, "b l k"]

    def of(self, rows: Any) -> OutOfExperts:
        return replace(self, chosen=self.chosen[rows])

    def push(self, x: Float[Tensor, "n l ki"]) -> Float[Tensor, "n l o"]:
        return summed(self.W, self.chosen, x)

    def pull(self, v: Float[Tensor, "n l o"]) -> Back:
        return Back(each(self.W.transpose(1, 2), self.chosen, v))


class Routing(NamedTuple):
    """Which experts a run chose."""

    chosen: Int[Tensor, "b l k"]
    n_experts: int


def each(W: Float[Tensor, "X o i"], chosen: Int[Tensor, "... k"], x: Float[Tensor, "... i"]) -> Tensor:
    """W_e x for each chosen e, side by side: ... k*o."""
    out = x.new_zeros(*chosen.shape, W.shape[1])
    for e in chosen.unique().tolist():
        at = (chosen == e).nonzero(as_tuple=True)
        out[at] = x[at[:-1]] @ W[e].t()
    return out.flatten(-2)


def summed(W: Float[Tensor, "X o i"], chosen: Int[Tensor, "... k"], x: Float[Tensor, "... ki"]) -> Tensor:
    """sum_e W_e x_e over the chosen e, of values that stand side by side."""
    x = x.unflatten(-1, (chosen.shape[-1], -1))
    out = x.new_zeros(*chosen.shape[:-1], W.shape[1])
    for e in chosen.unique().tolist():
        at = (chosen == e).nonzero(as_tuple=True)
        out.index_put_(at[:-1], x[at] @ W[e].t(), accumulate=True)  # an edited choice may name an expert twice
    return out


def of_experts(effects: Float[Tensor, "n l kF"], routing: Routing, rows: Rows) -> Tensor:
    """Effects of the chosen experts' neurons, summed for each expert: n l X, 0 where it was not chosen."""
    chosen = routing.chosen[rows]
    by_choice = effects.unflatten(-1, (chosen.shape[-1], -1)).sum(-1)
    return by_choice.new_zeros(*chosen.shape[:-1], routing.n_experts).scatter_add(-1, chosen, by_choice)
