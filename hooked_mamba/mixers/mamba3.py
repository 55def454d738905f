"""The Mamba-3 mixer, single input and output (arXiv:2603.15569): exponential-trapezoidal steps, turning B and C.

Glossary
    b, l  batch, positions     H  heads      P  channels of a head (E = H P)     N  d_state     G  groups     S  angles
    dt = softplus(dt' + dt_bias)     A = -max(f(A'), A_floor)     lam = sigmoid(lam')           one number per head
    A_bar = exp(A dt)     beta = (1 - lam) dt A_bar     gamma = lam dt
    theta_t = theta_{t-1} + pi tanh(ang_t) dt_t      B, C = turned by theta (norm(.) + bias)
    h_t = A_bar_t h_{t-1} + beta_t x_{t-1} B_{t-1}^T + gamma_t x_t B_t^T          y_t = h_t C_t + D x_t
    out = W_o (norm_H(y) SiLU(z))                          the norm only where the config asks for it
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import GroupedRMSNorm, Linear, at_least_fp32, rms_normalize, silu, softplus
from hooked_mamba.documents import Documents
from hooked_mamba.frozen.trapezoid import TrapezoidScan
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Read
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.mixers.states import linear_scan_through_hooks, scan_through_hooks
from hooked_mamba.mixers.token_shift import shifted
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.recurrent_config import Mamba3Config
from hooked_mamba.state import BranchState, Call, columns_read, loadable, zero_padding


@loadable
class Mamba3State(NamedTuple):
    """Memory of a Mamba-3 mixer."""

    theta: Tensor
    """The angles so far, b H S, float32 at least."""
    ssm: Tensor
    """h, b H P N, float32 at least."""
    B: Tensor
    """B of the last position, turned, b H N."""
    x: Tensor
    """x of the last position, b H P."""


class Mamba3Mixer(Branch):
    """in_proj -> norms of B and C -> turning -> trapezoidal scan -> gate -> out_proj."""

    kind = "mamba3"
    packs = True
    title = "Mamba-3"
    place = "mixer"
    config_class = Mamba3Config
    keep_float32: tuple[str, ...] = ("dt_bias", "B_bias", "C_bias", "D")
    sites: ClassVar[tuple[Site | Child, ...]] = (
        Site("hook_in_proj", "b l O", "whole projection, before the split"),
        Site("hook_z", "b l E", "gate branch, before SiLU"),
        Site("hook_x", "b l H P", "input of the scan; 0 at padding"),
        Site("hook_dt_pre", "b l H", "step size before softplus, bias included", wide=True),
        Site("hook_dt", "b l H", "step size dt, after softplus", wide=True),
        Site("hook_A", "b l H", "decay rate A, negative", wide=True),
        Site("hook_lam", "b l H", "share lam of the new input in a step", wide=True),
        Site("hook_angle", "b l H S", "angles theta by which B and C are turned", wide=True),
        Site("hook_B_pre", "b l H N", "input selection, normed and biased, before it is turned", wide=True),
        Site("hook_C_pre", "b l H N", "output selection, normed and biased, before it is turned", wide=True),
        Site("hook_B", "b l H N", "input selection B, as the scan sees it", wide=True),
        Site("hook_C", "b l H N", "output selection C, as the scan sees it", wide=True),
        Site("hook_A_bar", "b l H", "decay exp(A dt)", wide=True),
        Site("hook_beta", "b l H", "factor of the previous position's write", wide=True),
        Site("hook_gamma", "b l H", "factor of this position's write", wide=True),
        Site("hook_Bx_prev", "b l H P N", "written of the previous position, beta x B^T", kind="lazy", wide=True),
        Site("hook_Bx", "b l H P N", "written of this position, gamma x B^T", kind="lazy", wide=True),
        Site(
            "hook_h",
            "b l H P N",
            "states as read: an edit changes what position t reads out, not later states",
            kind="state",
            wide=True,
            single="the state right after position t: an edit affects all later positions",
        ),
        Site("hook_y_scan", "b l H P", "C h, before the D skip"),
        Site("hook_skip", "b l H P", "D x"),
        Site("hook_y", "b l H P", "scan output with the skip"),
        Child("norm", GroupedRMSNorm, symbols={"w": "E", "G": "H"}),
        Site("hook_gate", "b l E", "SiLU(z)"),
        Site("hook_y_gated", "b l E", "y * gate"),
        Site("hook_out_proj", "b l d", "mixer output, into the residual stream"),
    )

    def __init__(self, cfg: Mamba3Config, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        H, N = cfg.H, cfg.d_state
        self.in_proj = Linear(cfg.d_model, sum(cfg.in_widths), bias=cfg.use_bias)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.B_bias, self.C_bias = nn.Parameter(torch.empty(H, N)), nn.Parameter(torch.empty(H, N))
        self.B_norm_weight, self.C_norm_weight = nn.Parameter(torch.ones(N)), nn.Parameter(torch.ones(N))
        self.D = nn.Parameter(torch.empty(H))
        if cfg.norm_of_heads:
            self.norm = GroupedRMSNorm(cfg.E, cfg.norm_eps, H)
            self.frozen_sites = (*type(self).frozen_sites, "norm.hook_scale")
        self.out_proj = Linear(cfg.E, cfg.d_model, bias=cfg.use_bias)
        self.value_rows, self.head_width = slice(cfg.E, 2 * cfg.E), cfg.head_dim
        self.add_sites()

    def site_rows(self) -> tuple[Site | Child, ...]:
        return tuple(row for row in type(self).sites if row.name != "norm" or self.cfg.norm_of_heads)

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        sizes = {"d": cfg.d_model, "E": cfg.E, "H": cfg.H, "P": cfg.head_dim, "N": cfg.d_state, "S": cfg.S}
        return {**sizes, "O": sum(cfg.in_widths)}

    def facts(self) -> tuple[tuple[str, object], ...]:
        cfg = self.cfg
        return ("heads H × channels P", f"{cfg.H} × {cfg.head_dim}"), ("states N", cfg.d_state), ("angles S", cfg.S)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], Mamba3State]:
        cfg, H = self.cfg, self.cfg.H
        padding, documents = (None, None) if call is None else (call.padding, call.documents)
        real = zero_padding(padding)
        theta, h0, B_last, x_last = (None,) * 4 if state is None else state

        projected = self.hook_in_proj(self.in_proj(resid))
        z, x, B, C, dt, A, lam, angle = projected.split(cfg.in_widths, -1)
        z, x = self.hook_z(z), self.hook_x(real(rearrange(x, "b l (h p) -> b l h p", h=H)))
        dt_pre = self.hook_dt_pre(at_least_fp32(dt) + self.dt_bias)
        dt = self.hook_dt(real(softplus(dt_pre)))
        A = self.hook_A(-self.rate(at_least_fp32(A)).clamp(min=cfg.A_floor))
        lam = self.hook_lam(torch.sigmoid(at_least_fp32(lam)))

        step = math.pi * torch.tanh(at_least_fp32(angle)).unsqueeze(2) * dt.unsqueeze(-1)
        turned = self.hook_angle(summed(step, theta, documents))
        B = self.turn(self.hook_B_pre(self.of_heads(B, self.B_norm_weight, self.B_bias)), turned)
        C = self.turn(self.hook_C_pre(self.of_heads(C, self.C_norm_weight, self.C_bias)), turned)
        B, C = self.hook_B(B), self.hook_C(C)

        A_bar = self.hook_A_bar(torch.exp(A * dt))
        beta = self.hook_beta((1 - lam) * dt * A_bar)
        gamma = self.hook_gamma(lam * dt)
        written = self.entered(x)
        x_before, B_before = (
            shifted(v.flatten(2), None if last is None else last.flatten(1), padding, documents)[0].reshape(v.shape)
            for v, last in ((written, None if x_last is None else self.written(x_last.unsqueeze(1))), (B, B_last))
        )
        x_last = shifted(x.flatten(2), None if x_last is None else x_last.flatten(1), padding, documents)[1]
        B_last = shifted(B.flatten(2), None if B_last is None else B_last.flatten(1), padding, documents)[1]

        if self.discrete_sites_edited:
            y_scan, h = self.materialised(written, x_before, B, B_before, C, A_bar, beta, gamma, h0)
        else:
            y_scan, h = self.fused(written, x_before, B, B_before, C, A * dt, (A, lam), h0)
        y = self.hook_y(self.hook_y_scan(y_scan) + self.hook_skip((self.D.unsqueeze(-1) * written).to(x.dtype)))
        after = Mamba3State(turned[:, -1], h, B_last.unflatten(1, B.shape[2:-1] + (-1,)), x_last.unflatten(1, (H, -1)))
        return self.hook_out_proj(self.out_proj(columns_read(self.gated(y, z), call))), after

    # Steps that differ with several inputs and outputs -------------------------------------------------------------

    def written(self, x: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l ... P"]:
        """What is written of x."""
        return x

    def entered(self, x: Float[Tensor, "b l H P"]) -> Float[Tensor, "b l ... P"]:
        """The same through its hook, if it is not a site already."""
        return x

    def turn(self, v: Float[Tensor, "b l H N"], theta: Float[Tensor, "b l H S"]) -> Float[Tensor, "b l H N"]:
        """The first S pairs (2i, 2i+1) turned by their angles."""
        S = theta.shape[-1]
        pairs = v[..., : 2 * S].unflatten(-1, (S, 2))
        turned = torch.stack(turned_pairs(pairs[..., 0], pairs[..., 1], theta), -1).flatten(-2)
        return torch.cat([turned, v[..., 2 * S :]], -1)

    def gated(self, y: Float[Tensor, "b l H P"], z: Float[Tensor, "b l E"]) -> Float[Tensor, "b l E"]:
        """What the output's weights read."""
        y = self.norm(y.flatten(2)) if self.cfg.norm_of_heads else y.flatten(2)
        return self.hook_y_gated(y * self.hook_gate(silu(z)))

    def read_state(self, h: Tensor, C: Tensor, dtype: torch.dtype) -> Float[Tensor, "b l H P"]:
        """h C of each head."""
        return torch.einsum("blhpn,blhn->blhp", h, C.to(h.dtype)).to(dtype)

    def write(self, factor: Tensor, x: Tensor, B: Tensor) -> Float[Tensor, "b l H P N"]:
        """factor x B^T of each head."""
        return (factor.unsqueeze(-1) * x).unsqueeze(-1) * B.unsqueeze(-2)

    def rate(self, pre: Tensor) -> Tensor:
        """f: from A' to the rate of decay, before the floor."""
        if self.cfg.A_act == "softplus":
            return softplus(pre)
        return torch.where(pre > 0, 1 + pre, 1 / (1 - pre.clamp(max=0)))

    def of_heads(self, v: Float[Tensor, "b l gn"], weight: Tensor, bias: Tensor) -> Float[Tensor, "b l H N"]:
        """B or C of every head, normed, biased, float32 at least."""
        cfg = self.cfg
        groups = rearrange(at_least_fp32(v), "b l (g n) -> b l g n", n=cfg.d_state)
        return (rms_normalize(groups, cfg.norm_eps) * weight).repeat_interleave(cfg.H // cfg.n_groups, 2) + bias

    @property
    def discrete_sites_edited(self) -> bool:
        """Whether a hook sits on a site that only the discrete recurrence has."""
        names = ("A_bar", "beta", "gamma", "Bx_prev", "Bx", "h")
        return any(getattr(self, f"hook_{name}").edited for name in names)

    def materialised(self, x, x_before, B, B_before, C, A_bar, beta, gamma, h0):  # type: ignore[no-untyped-def]
        """The recurrence with every write computed."""
        old = self.hook_Bx_prev(self.write(beta, x_before, B_before))
        new = self.hook_Bx(self.write(gamma, x, B))
        h, last = linear_scan_through_hooks(self.hook_h, A_bar[..., None, None], old + new, h0)
        h = self.hook_h(h) if self.hook_h.wanted else h
        return self.read_state(h, C, x.dtype), last

    def shares(self, x, x_before, A_dt, rates):  # type: ignore[no-untyped-def]
        """gamma x and beta x of the position before, both divided by -A dt, which may be 0."""
        A, lam = (rate.reshape(*rate.shape[:2], *(1,) * (x.ndim - 4), -1, 1) for rate in rates)
        alpha = torch.exp(A_dt).reshape(A.shape)
        return lam / -A * at_least_fp32(x), (1 - lam) * alpha / -A * at_least_fp32(x_before)

    def fused(self, x, x_before, B, B_before, C, A_dt, rates, h0):  # type: ignore[no-untyped-def]
        """The sum of two scans with the same decay: one writes x_t B_t, the other x_{t-1} B_{t-1}.

        A scan of Mamba-2 with step -A dt and rate -1 writes -A dt x B; gamma and beta divided by it are finite.
        """
        now, then = self.shares(x, x_before, A_dt, rates)
        self.hook_Bx_prev.read(x.shape[1], lambda t: self.write(-A_dt[:, t], then[:, t], B_before[:, t]))
        self.hook_Bx.read(x.shape[1], lambda t: self.write(-A_dt[:, t], now[:, t], B[:, t]))
        one = -torch.ones_like(A_dt[0, 0])
        chunk = ops.default_chunk(x.shape[1])

        def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ScanOut:
            step, read = -A_dt[:, t], C[:, t]
            a = ops.ssd(now[:, t], step, one, B[:, t], read, h0=h, states_at=states_at, chunk=chunk)
            b = ops.ssd(then[:, t], step, one, B_before[:, t], read, states_at=states_at, chunk=chunk)
            states = None if a.states is None or b.states is None else a.states + b.states
            return ScanOut((a.y + b.y).to(x.dtype), a.h_last + b.h_last, states)

        return scan_through_hooks(self.hook_h, x.shape[1], h0, scan, lambda h, t: self.read_state(h, C[:, t], x.dtype))

    # The linear form: dt, A, lam, B, C, the gate and the norm's divisor are held -------------------------------------

    frozen_sites = tuple(f"hook_{name}" for name in ("x", "dt", "A", "beta", "gamma", "B", "C", "gate"))
    places: ClassVar = {"u": "hook_x", "y": "hook_y", "state": "hook_h"}
    vectors_site: str | None = "hook_y_gated"

    def held_scan(self, read: Read) -> TrapezoidScan:
        u, dt, A, beta, gamma, B, C = (read(f"hook_{n}") for n in ("x", "dt", "A", "beta", "gamma", "B", "C"))
        beside = at_least_fp32(self.D).expand(u.shape[:3])
        return TrapezoidScan(u, -A * dt, beta, gamma, B.unsqueeze(2), C.unsqueeze(2), beside)

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"] | None:
        """The gate, and the weight and divisor of the heads' norm."""
        gain = at_least_fp32(read("hook_gate"))
        if not self.cfg.norm_of_heads:
            return gain
        grouped = (gain * self.norm.weight).unflatten(2, (self.cfg.H, -1)) / read("norm.hook_scale")
        return grouped.flatten(2)

    def memory(self, before: BranchState | None) -> Tensor | None:
        return before[1] if before else None

    def entering(self, before: BranchState | None) -> Float[Tensor, "b H P M"] | None:
        """h, and x B^T of the last position, which the next one writes."""
        if not before:
            return None
        _, h, B, x = before
        return torch.cat([h, self.outer(x, B).to(h.dtype)], -1)

    def outer(self, x: Float[Tensor, "b H P"], B: Tensor) -> Float[Tensor, "b H P N"]:
        """x B^T."""
        return x.unsqueeze(-1) * B.unsqueeze(-2)

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        return [("hook_in_proj", self.in_proj.bias), ("hook_out_proj", self.out_proj.bias)]

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> Mamba3State:
        """The empty memory, where the weights are; on "meta" its shapes alone."""
        cfg, wide, own = self.cfg, self.dt_bias, self.in_proj.weight
        return Mamba3State(
            wide.new_zeros(batch, cfg.H, cfg.S, device=device),
            wide.new_zeros(batch, cfg.H, cfg.head_dim, cfg.d_state, device=device),
            wide.new_zeros(batch, cfg.H, cfg.d_state, device=device),
            own.new_zeros(batch, cfg.H, cfg.head_dim, device=device),
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: dt log-uniform from 0.001 to 0.1, biases of B and C 1, projections Kaiming-uniform."""
        for linear in (self.in_proj, self.out_proj):
            uniform_fan_in(linear.weight, linear.in_features, generator)
            if linear.bias is not None:
                linear.bias.zero_()
        self.out_proj.weight /= self.cfg.n_layers**0.5
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(-6.9, -2.3, generator=generator))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for parameter in (self.B_bias, self.C_bias, self.B_norm_weight, self.C_norm_weight, self.D):
            parameter.fill_(1)
        if self.cfg.norm_of_heads:
            self.norm.weight.fill_(1)


def summed(
    step: Float[Tensor, "b l H S"], theta: Float[Tensor, "b H S"] | None, documents: Documents | None
) -> Float[Tensor, "b l H S"]:
    """The angle at every position: the steps so far, from theta on."""
    if documents is not None:
        return documents.cumsum(step, theta)
    return step.cumsum(1) if theta is None else step.cumsum(1) + theta.unsqueeze(1)


def turned_pairs(a: Tensor, b: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (a, b) turned by theta."""
    cos, sin = torch.cos(theta), torch.sin(theta)
    return a * cos - b * sin, a * sin + b * cos
