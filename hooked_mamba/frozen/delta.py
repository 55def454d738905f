"""The held scan of a delta rule: RWKV-7, gated DeltaNet.

S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + strength_t v_t k_t^T,      y_t = S_t r_t

With r, w, k, a, b and the strength held, y is linear in v, one signed number per head and pair:

rho_t = r_t;      alpha[t, s] = strength_s k_s . rho_s;      rho_{s-1} = w_s rho_s + a_s (b_s . rho_s)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.frozen.scan import HeldScan, resolve_queries, states_before
from hooked_mamba.ops.delta_scan._adjoint import from_the_end
from hooked_mamba.ops.interface import ScanOut, StateEdits


@dataclass(frozen=True)
class DeltaScan(HeldScan):
    """What a delta rule reads."""

    u: Float[Tensor, "b l H P"]
    """Values v."""
    r: Float[Tensor, "b l H K"]
    w: Float[Tensor, "b l H W"]
    k: Float[Tensor, "b l H K"]
    a: Float[Tensor, "b l H K"]
    b: Float[Tensor, "b l H B"]
    """K numbers, or one: that multiple of k."""
    strength: Float[Tensor, "b l H"]
    """Factor of the value in the write."""
    removes_decayed: bool = False
    """Whether the removal reads the decayed state: b has the decay in it, b = -w strength k (gated DeltaNet)."""

    def over(self, u: Float[Tensor, "n l H P"], rows: Any = None) -> DeltaScan:
        def held(part: Tensor) -> Tensor:
            return (part if rows is None else part[rows]).to(u.dtype)

        return self._with(u, held)

    def _with(self, u: Float[Tensor, "n l h P"], change: Callable[[Tensor], Tensor]) -> DeltaScan:
        """Other values, and all that is held passed through a function."""
        names = ("r", "w", "k", "a", "b", "strength")
        held: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, u=u, **held)

    def out(
        self,
        h0: Float[Tensor, "b ..."] | None = None,
        *,
        states_at: Sequence[int] | None = None,
        edits: StateEdits | None = None,
        frozen: bool = False,
    ) -> ScanOut:
        if h0 is not None:
            h0 = h0.reshape(*self.u.shape[:1], *self.u.shape[2:], -1)
        strength = self.strength.detach() if frozen else self.strength
        v = strength.unsqueeze(-1) * self.u
        found = ops.delta_scan(
            self.r, self.w, self.k, v, self.a, self.b, h0=h0, states_at=states_at, edits=edits, frozen=frozen
        )
        return ScanOut(found.y, found.h_last, found.states)

    def chosen(self, lanes: Sequence[int] | slice) -> DeltaScan:
        """Only these heads."""
        at = self.lane_numbers(lanes)
        return self._with(self.u[:, :, at], lambda part: part[:, :, at])

    def adjoint(self, vy: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l H P K"]:
        """What covectors on y are on the state right after each position: Lam_t = vy_t r_t^T + Lam_{t+1} M_{t+1}^T."""
        reversed_scan = from_the_end(self.r, self.w, self.k, vy, self.a, self.b)
        states = ops.delta_scan(*reversed_scan, states_at="all").states
        assert states is not None  # they were asked for
        return states.flip(1)

    def switched_off(
        self, head: int, vy: Float[Tensor, "b l E"], h0: Tensor | None
    ) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b l"], Float[Tensor, "b l"]]:
        (at,) = self.lane_numbers([head])
        one, vy = self.chosen([at]), vy.unflatten(2, (self.n_lanes, -1))[:, :, [at]]
        if h0 is not None:
            h0 = h0.reshape(self.batch, self.n_lanes, self.width, -1)[:, [at]]
        S = one.out(h0, states_at=range(self.length)).states
        assert S is not None  # they were asked for
        S = states_before(S, h0)
        Lam = one.adjoint(vy)
        v = one.strength.unsqueeze(-1) * one.u
        write = -torch.einsum("blhv,blhvk,blhk->bl", v, Lam, one.k)
        recall = torch.einsum("blhvk,blhk->blhv", S, one.a)
        removal = -torch.einsum("blhv,blhvk,blhk->bl", recall, Lam, one.b.expand_as(one.k))
        decay = (S * (1 - one.w).unsqueeze(-2) * Lam).flatten(2).sum(-1)
        if one.removes_decayed:
            undecayed = -one.strength.unsqueeze(-1) * one.k
            decay = decay + torch.einsum("blhv,blhvk,blhk->bl", recall, Lam, undecayed - one.b)
        return write, removal, decay

    def rows(
        self,
        queries: Sequence[int] | None = None,
        *,
        lanes: Sequence[int] | slice | None = None,
        include_skip: bool = True,
    ) -> Float[Tensor, "b H q l"]:
        chosen = slice(None) if lanes is None else self.lane_numbers(lanes)
        r, w, k, a, b = (part[:, :, chosen] for part in (self.r, self.w, self.k, self.a, self.b))
        at = resolve_queries(queries, self.length)
        ascending = sorted(set(at))
        found = ops.delta_rows(r, w, k, a, b, ascending)
        if at != ascending:
            found = found[:, [ascending.index(t) for t in at]]
        return found.transpose(1, 2) * self.strength[:, :, chosen].transpose(1, 2).unsqueeze(2).to(found.dtype)

    def diagonal(self, *, include_skip: bool = True) -> Float[Tensor, "b l H"]:
        return (self.k * self.r).sum(-1) * self.strength

    def write(self, u: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l H P N"]:
        return (self.strength.unsqueeze(-1) * u).unsqueeze(-1) * self.k.unsqueeze(-2)

    def transport(self, source: int) -> Float[Tensor, "b l H N"]:
        """The length of what is left of the key k_s, as a part of its own: |k_s M_{s+1} ... M_t| / |k_s|."""
        one = self.values.new_zeros(*self.u.shape[:3], 1)
        one[:, source] = 1
        b = self.b
        states = ops.delta_scan(self.r, self.w, self.k, one, self.a, b, states_at="all").states
        assert states is not None  # they were asked for
        length = self.k[:, source].norm(dim=-1).clamp(min=torch.finfo(one.dtype).tiny)
        return states[..., 0, :].norm(dim=-1, keepdim=True) / length[:, None, :, None]
