"""The Mamba-3 mixer with several inputs and outputs of each head (MIMO, arXiv:2603.15569): a state is written R times
and read R times at each position.

Glossary, beside that of `mamba3`
    R  ranks, r                    x_r = x mimo_x_r          B_r, C_r  normed, biased and turned, for each rank
    h_t = A_bar_t h_{t-1} + sum_r [beta_t x_{r,t-1} B_{r,t-1}^T + gamma_t x_{r,t} B_{r,t}^T]
    y_r = h C_r + D x_r            out = W_o sum_r norm_H(y_r) SiLU(z mimo_z_r) mimo_o_r        the norm where asked for
Pairs that turn are (i, i + N/2) here and (2i, 2i+1) with a single input, as the published kernels have them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import GroupedRMSNorm, at_least_fp32, rms_normalize, silu
from hooked_mamba.frozen.trapezoid import TrapezoidScan
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.mixers.linear_form import Read
from hooked_mamba.mixers.mamba3 import Mamba3Mixer, Mamba3State, turned_pairs
from hooked_mamba.mixers.states import scan_through_hooks
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.recurrent_config import Mamba3MIMOConfig


class RankedRMSNorm(GroupedRMSNorm):
    """RMSNorm of each head and rank by itself; ranks share one weight."""

    sites = (
        Site("hook_scale", "b l R H 1", "the divisor of each head and rank", wide=True),
        Site("hook_normalized", "b l R w", "y / scale, before the weight", wide=True),
        Site("hook_out", "b l R w", "after the weight"),
    )

    def __init__(self, width: int, eps: float, heads: int, ranks: int) -> None:
        super().__init__(width, eps, heads)
        self.ranks = ranks

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "R": self.ranks, "H": self.groups}

    def forward(self, x: Float[Tensor, "b l r w"]) -> Float[Tensor, "b l r w"]:
        heads = at_least_fp32(x).unflatten(-1, (self.groups, -1))
        scale = self.hook_scale((heads.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized((heads / scale).flatten(-2))
        return self.hook_out((normalized * self.weight).to(self.weight.dtype))


WITH_RANKS = {
    "hook_B_pre": "b l R H N",
    "hook_C_pre": "b l R H N",
    "hook_B": "b l R H N",
    "hook_C": "b l R H N",
    "hook_y_scan": "b l R H P",
    "hook_skip": "b l R H P",
    "hook_y": "b l R H P",
    "hook_gate": "b l R E",
    "hook_y_gated": "b l R E",
}
"""Sites of the mixer with a single input that have an axis of ranks here."""


def _sites() -> tuple[Site | Child, ...]:
    """The sites of the mixer with a single input, and two more."""
    rows: list[Site | Child] = []
    for row in Mamba3Mixer.sites:
        if isinstance(row, Child):
            rows.append(Child("norm", RankedRMSNorm, symbols={"w": "E"}))
            continue
        if row.name == "hook_A_bar":
            rows.append(Site("hook_x_rank", "b l R H P", "x mimo_x: the input of each rank"))
        if row.name == "hook_out_proj":
            rows.append(Site("hook_y_merged", "b l E", "the ranks' gated outputs, summed with mimo_o"))
        rows.append(replace(row, shape=WITH_RANKS.get(row.name, row.shape)))
    return tuple(rows)


class Mamba3MIMOMixer(Mamba3Mixer):
    """in_proj -> norms of B and C -> turning -> trapezoidal scan of R ranks -> gates -> sum of ranks -> out_proj."""

    kind = "mamba3_mimo"
    title = "Mamba-3 (MIMO)"
    place = "mixer"
    config_class = Mamba3MIMOConfig
    keep_float32 = (*Mamba3Mixer.keep_float32, "mimo_x", "mimo_z", "mimo_o")
    sites = _sites()
    cfg: Mamba3MIMOConfig

    def __init__(self, cfg: Mamba3MIMOConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        R, H, P, N = cfg.mimo_rank, cfg.H, cfg.head_dim, cfg.d_state
        self.B_bias, self.C_bias = nn.Parameter(torch.empty(H, R, N)), nn.Parameter(torch.empty(H, R, N))
        for name in ("mimo_x", "mimo_z", "mimo_o"):
            setattr(self, name, nn.Parameter(torch.empty(H, R, P)))
        if cfg.norm_of_heads:
            self.norm = RankedRMSNorm(cfg.E, cfg.norm_eps, H, R)

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "R": self.cfg.mimo_rank}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return (*super().facts(), ("ranks R", self.cfg.mimo_rank))

    # The steps that differ -------------------------------------------------------------------------------------

    def of_heads(self, v: Float[Tensor, "b l rgn"], weight: Tensor, bias: Tensor) -> Float[Tensor, "b l R H N"]:
        cfg = self.cfg
        groups = rearrange(at_least_fp32(v), "b l (r g n) -> b l r g n", r=cfg.mimo_rank, n=cfg.d_state)
        heads = (rms_normalize(groups, cfg.norm_eps) * weight).repeat_interleave(cfg.H // cfg.n_groups, 3)
        return heads + bias.transpose(0, 1)

    def turn(self, v: Float[Tensor, "b l R H N"], theta: Float[Tensor, "b l H S"]) -> Float[Tensor, "b l R H N"]:
        """Pairs (i, i + N/2), of which the first S turn."""
        S, half, theta = theta.shape[-1], v.shape[-1] // 2, theta.unsqueeze(2)
        a, b = turned_pairs(v[..., :S], v[..., half : half + S], theta)
        return torch.cat([a, v[..., S:half], b, v[..., half + S :]], -1)

    def written(self, x: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l R H P"]:
        return (x.unsqueeze(2) * self.mimo_x.transpose(0, 1)).to(x.dtype)

    def entered(self, x: Tensor) -> Float[Tensor, "b l R H P"]:
        return self.hook_x_rank(self.written(x))

    def read_state(self, h: Tensor, C: Tensor, dtype: torch.dtype) -> Float[Tensor, "b l R H P"]:
        return torch.einsum("blhpn,blrhn->blrhp", h, C.to(h.dtype)).to(dtype)

    def write(self, factor: Tensor, x: Tensor, B: Tensor) -> Float[Tensor, "b l H P N"]:
        return torch.einsum("blh,blrhp,blrhn->blhpn", factor, at_least_fp32(x), B)

    def gated(self, y: Float[Tensor, "b l R H P"], z: Float[Tensor, "b l E"]) -> Float[Tensor, "b l E"]:
        y = self.norm(y.flatten(3)) if self.cfg.norm_of_heads else y.flatten(3)
        up, down = (m.transpose(0, 1).flatten(1) for m in (self.mimo_z, self.mimo_o))
        gate = self.hook_gate(silu(z.unsqueeze(2) * up).to(z.dtype))
        return self.hook_y_merged((self.hook_y_gated(y * gate) * down).sum(2).to(z.dtype))

    def fused(self, x, x_before, B, B_before, C, A_dt, rates, h0):  # type: ignore[no-untyped-def]
        """Scans of single inputs, whose states sum: one for each rank that writes, and each rank that reads."""
        R, H = x.shape[2:4]
        now, then = self.shares(x, x_before, A_dt, rates)
        self.hook_Bx_prev.read(x.shape[1], lambda t: self.write(-A_dt[:, t], then[:, t], B_before[:, t]))
        self.hook_Bx.read(x.shape[1], lambda t: self.write(-A_dt[:, t], now[:, t], B[:, t]))
        step, one = -A_dt.repeat(1, 1, 2 * R), -torch.ones(2 * R * H, dtype=A_dt.dtype, device=A_dt.device)
        values, keys = (torch.cat(pair, 2).flatten(2, 3) for pair in ((now, then), (B, B_before)))
        chunk = ops.default_chunk(x.shape[1])

        def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ScanOut:
            first = None if h is None else torch.cat([h, *[torch.zeros_like(h)] * (2 * R - 1)], 1)
            ys = []
            for r in range(R):
                read = C[:, t, r].repeat(1, 1, 2 * R, 1)
                options = {"h0": first, "states_at": states_at, "chunk": chunk}
                out = ops.ssd(values[:, t], step[:, t], one, keys[:, t], read, **options)
                ys.append(out.y.unflatten(2, (2 * R, H)).sum(2))
            states = None if out.states is None else out.states.unflatten(2, (2 * R, H)).sum(2)
            return ScanOut(torch.stack(ys, 2).to(x.dtype), out.h_last.unflatten(1, (2 * R, H)).sum(1), states)

        return scan_through_hooks(self.hook_h, x.shape[1], h0, scan, lambda h, t: self.read_state(h, C[:, t], x.dtype))

    # The linear form: each channel is written along sum_r mimo_x_r B_r and read along sum_r gate_r mimo_o_r C_r -------

    frozen_sites = Mamba3Mixer.frozen_sites
    places: ClassVar = {"u": "hook_x", "y": "hook_y_merged", "state": "hook_h"}
    vectors_site = "hook_y_merged"

    def held_scan(self, read: Read) -> TrapezoidScan:
        cfg = self.cfg
        u, dt, A, beta, gamma, B, C = (read(f"hook_{n}") for n in ("x", "dt", "A", "beta", "gamma", "B", "C"))
        up, down = (at_least_fp32(m.detach().transpose(0, 1)) for m in (self.mimo_x, self.mimo_o))
        gate = at_least_fp32(read("hook_gate")).unflatten(3, (cfg.H, -1))
        if cfg.norm_of_heads:
            gate = gate * self.norm.weight.detach().unflatten(0, (cfg.H, -1)) / read("norm.hook_scale")
        down = down * gate
        beside = (down * up).sum(2) * self.D.detach().unsqueeze(-1)
        return TrapezoidScan(u.flatten(2).unsqueeze(3), -A * dt, beta, gamma, B, C, beside.flatten(2), up, down)

    def output_gain(self, read: Read) -> None:
        """Nothing: the gates of the ranks are within the scan."""
        return None

    def outer(self, x: Float[Tensor, "b H P"], B: Float[Tensor, "b R H N"]) -> Float[Tensor, "b H P N"]:
        return torch.einsum("brhp,brhn->bhpn", at_least_fp32(self.written(x.unsqueeze(1))[:, 0]), B)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> Mamba3State:
        state, cfg = super().initial_state(batch, device), self.cfg
        return state._replace(B=self.dt_bias.new_zeros(batch, cfg.mimo_rank, cfg.H, cfg.d_state, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As with a single input; the ranks begin alike, and sum to what one rank gives."""
        super().reset_parameters(generator)
        self.mimo_z.fill_(1)
        for parameter in (self.mimo_x, self.mimo_o):
            parameter.fill_(1 / self.cfg.mimo_rank)
