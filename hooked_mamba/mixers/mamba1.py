"""The Mamba-1 mixer (Gu & Dao 2023, arXiv:2312.00752, section 3), and Falcon-Mamba's.

Glossary
    b, l  batch, positions          E  d_inner, channels        N  d_state
    K     taps of the convolution   R  rank of the step size    d  d_model
    A_bar = exp(dt A)   B_bar = dt B (Euler)   h_t = A_bar_t h_{t-1} + B_bar_t x_t   y_t = C_t h_t + D x_t
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import Linear, at_least_fp32, conv_silu, rms_normalize, silu, softplus
from hooked_mamba.config import MambaConfig
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Hooks, Read
from hooked_mamba.mixers.precision import initial_dt_bias, uniform_fan_in
from hooked_mamba.mixers.selective_rules import RULE_SITES, selective_rule_hooks
from hooked_mamba.mixers.states import linear_scan_through_hooks, scan_through_hooks
from hooked_mamba.mixers.weight_views import Mamba1Views
from hooked_mamba.state import BranchState, Call, LayerState, columns_read, with_history, zero_padding


class Mamba1Mixer(Mamba1Views, Branch):
    """in_proj -> conv -> selective scan -> gate -> out_proj, with a hook point at every site."""

    kind = "mamba"
    packs = True
    title = "Mamba-1"
    place = "mixer"
    config_class = MambaConfig
    keep_float32 = ("A_log", "D", "dt_proj.bias")
    sites: ClassVar[tuple[Site | Child, ...]] = (
        Site("hook_in_proj", "b l 2E", "whole projection, before the split"),
        Site("hook_x_pre", "b l E", "convolution input"),
        Site("hook_z", "b l E", "gate branch, before SiLU"),
        Site("hook_conv", "b l E", "convolution output, before SiLU", also=("hook_conv",)),
        Site("hook_x", "b l E", "SSM input, after SiLU", also=("hook_ssm_input",)),
        Site("hook_x_proj", "b l R+2N", "whole x_proj output: low-rank dt, B, C"),
        Site("hook_dt_low", "b l R", "low-rank step size: what dt_proj reads", also=("hook_delta_1",)),
        Site(
            "hook_dt_pre",
            "b l E",
            "step size before softplus, bias included",
            wide=True,
            also=("hook_ssm_dt", "hook_delta_2"),
        ),
        Site("hook_dt", "b l E", "step size dt, after softplus and clamp", wide=True, also=("hook_delta",)),
        Site("hook_B", "b l N", "input selection B, as the scan sees it", also=("hook_B",)),
        Site("hook_C", "b l N", "output selection C, as the scan sees it", also=("hook_C",)),
        Site("hook_A_bar", "b l E N", "decay exp(dt A)", kind="lazy", wide=True, also=("hook_A_bar",)),
        Site("hook_B_bar", "b l E N", "dt B (Euler)", kind="lazy", wide=True, also=("hook_B_bar",)),
        Site("hook_Bx", "b l E N", "what is written into the state", kind="lazy", wide=True),
        Site(
            "hook_h",
            "b l E N",
            "states as read: an edit changes what position t reads out, not later states",
            kind="state",
            wide=True,
            single="the state right after position t: an edit affects all later positions",
            also=("hook_h",),
        ),
        Site("hook_y_scan", "b l E", "C h, before the D skip"),
        Site("hook_skip", "b l E", "D x"),
        Site("hook_y", "b l E", "scan output with the skip", also=("hook_ssm_output",)),
        Site("hook_gate", "b l E", "SiLU(z)"),
        Site("hook_y_gated", "b l E", "y * gate", also=("hook_after_skip",)),
        Site(
            "hook_out_proj",
            "b l d",
            "mixer output, into the residual stream",
            also=("hook_out_proj", "hook_ssm_out"),
        ),
    )

    frozen_sites = tuple(f"hook_{site}" for site in ("x_pre", "conv", "x", "dt", "B", "C", "gate"))
    places: ClassVar = {"p": "hook_x_pre", "u": "hook_x", "y": "hook_y", "write": "hook_Bx", "state": "hook_h"}
    vectors_site = "hook_y_gated"
    selection_reads = "u"
    rule_sites = (*RULE_SITES, "hook_x_proj")

    def __init__(self, cfg: MambaConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        E, N, R, d = cfg.E, cfg.d_state, cfg.R, cfg.d_model
        self.in_proj = Linear(d, 2 * E, bias=cfg.use_bias)
        self.reach = cfg.d_conv
        self.conv1d = nn.Conv1d(E, E, cfg.d_conv, groups=E, bias=cfg.conv_bias)
        self.x_proj = Linear(E, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = Linear(E, d, bias=cfg.use_bias)
        if cfg.mixer_norm_weights:
            self.dt_norm_weight = nn.Parameter(torch.empty(R))
            self.B_norm_weight = nn.Parameter(torch.empty(N))
            self.C_norm_weight = nn.Parameter(torch.empty(N))
        self.value_rows = slice(0, E)

        self.add_sites()

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        return {"d": cfg.d_model, "E": cfg.E, "N": cfg.d_state, "R": cfg.R}

    def facts(self) -> tuple[tuple[str, object], ...]:
        cfg = self.cfg
        return ("channels E", cfg.E), ("states N", cfg.d_state), ("convolution taps K", cfg.d_conv)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], LayerState]:
        E, N, R = self.cfg.E, self.cfg.d_state, self.cfg.R
        padding, documents = (None, None) if call is None else (call.padding, call.documents)
        real = zero_padding(padding)
        # An empty memory is None: some kernels start from no other.
        past, h0 = (self.empty_history(len(resid)), None) if state is None else state

        xz = self.hook_in_proj(self.in_proj(resid))
        x = self.hook_x_pre(real(xz[..., :E]))
        z = self.hook_z(xz[..., E:])

        x, before, history = with_history(x, past, padding, documents)
        x = self.hook_x(real(conv_silu(x, before, self.conv1d, self.hook_conv, documents)))

        x_proj = self.hook_x_proj(self.x_proj(x))
        dt_low, B, C = x_proj.split([R, N, N], -1)
        if self.cfg.mixer_norms:
            dt_low, B, C = (rms_normalize(v, self.cfg.mixer_norm_eps) for v in (dt_low, B, C))
        if self.cfg.mixer_norm_weights:
            dt_low, B, C = dt_low * self.dt_norm_weight, B * self.B_norm_weight, C * self.C_norm_weight
        dt_low = self.hook_dt_low(dt_low)
        dt_pre = self.hook_dt_pre(self.dt_proj(dt_low))

        if padding is None and documents is None and not self.inside_wanted:
            if self.hook_dt.readers:  # formed on the side: the scan makes its own
                self.hook_dt.show(softplus(dt_pre))
            B, C = self.hook_B(B), self.hook_C(C)
            y_gated, h = ops.gated_scan(x, dt_pre, self.A, B, C, self.D, z, h0)
        else:
            dt = self.hook_dt(real(softplus(dt_pre)))
            B, C = self.hook_B(B), self.hook_C(C)
            y_scan, h = self.ssm(x, dt, B, C, h0)
            y_scan = self.hook_y_scan(y_scan)
            skip = self.hook_skip((self.D * x).to(x.dtype))
            y = self.hook_y(y_scan + skip)
            gate = self.hook_gate(silu(z))
            y_gated = y * gate

        y_gated = self.hook_y_gated(y_gated)
        return self.hook_out_proj(self.out_proj(columns_read(y_gated, call))), LayerState(history, h)

    def ssm(
        self,
        x: Float[Tensor, "b l E"],
        dt: Float[Tensor, "b l E"],
        B: Float[Tensor, "b l N"],
        C: Float[Tensor, "b l N"],
        h0: Float[Tensor, "b E N"] | None,
    ) -> tuple[Float[Tensor, "b l E"], Float[Tensor, "b E N"]]:
        """C h for every position, without the skip, and the last state."""
        A = self.A

        def A_bar_at(t: list[int] | slice) -> Tensor:
            return torch.exp(dt[:, t].unsqueeze(-1) * A)

        def B_bar_at(t: list[int] | slice) -> Tensor:
            return dt[:, t].unsqueeze(-1) * B[:, t].unsqueeze(2)

        def Bx_at(t: list[int] | slice) -> Tensor:
            return B_bar_at(t) * x[:, t].unsqueeze(-1)

        def read_out(h: Tensor, t: slice) -> Tensor:
            return torch.einsum("blen,bln->ble", h, C[:, t].to(h.dtype)).to(x.dtype)

        if self.discrete_sites_edited:
            everything = slice(None)
            A_bar = self.hook_A_bar(A_bar_at(everything))
            B_bar = self.hook_B_bar(B_bar_at(everything))
            Bx = self.hook_Bx(B_bar * x.unsqueeze(-1))
            h, h_last = linear_scan_through_hooks(self.hook_h, A_bar, Bx, h0)
            return read_out(self.hook_h(h), everything), h_last

        self.hook_A_bar.read(x.shape[1], A_bar_at)
        self.hook_B_bar.read(x.shape[1], B_bar_at)
        self.hook_Bx.read(x.shape[1], Bx_at)

        def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ops.ScanOut:
            return ops.selective_scan(x[:, t], dt[:, t], A, B[:, t], C[:, t], h0=h, states_at=states_at)

        return scan_through_hooks(self.hook_h, x.shape[1], h0, scan, read_out)

    @property
    def inside_wanted(self) -> bool:
        """Whether a site between dt_pre and y_gated is in use, so that these must be computed one by one."""
        states = (self.hook_A_bar, self.hook_B_bar, self.hook_Bx, self.hook_h)
        steps = (self.hook_y_scan, self.hook_skip, self.hook_y, self.hook_gate)
        # A reader of dt who may want its gradient needs the one that the scan reads.
        dt = self.hook_dt.wanted if torch.is_grad_enabled() else self.hook_dt.edited
        return dt or any(site.wanted for site in (*states, *steps, *self.hook_h.points.values()))

    @property
    def discrete_sites_edited(self) -> bool:
        """Whether a hook sits on A_bar, B_bar, Bx or the stacked h, so that the recurrence must run unfused."""
        return any(site.edited for site in (self.hook_A_bar, self.hook_B_bar, self.hook_Bx, self.hook_h))

    @property
    def A(self) -> Float[Tensor, "E N"]:
        """Continuous-time decay rates, negative."""
        return -torch.exp(at_least_fp32(self.A_log))

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> LayerState:
        """The empty memory, where the weights are; on "meta" its shapes alone."""
        ssm = self.A_log.new_zeros(batch, self.cfg.E, self.cfg.d_state, device=device)
        return LayerState(self.empty_history(batch, device), ssm)

    def empty_history(self, batch: int, device: torch.device | str | None = None) -> Float[Tensor, "b k E"]:
        """The convolution's inputs before the first position."""
        return self.in_proj.weight.new_zeros(batch, self.cfg.d_conv - 1, self.cfg.E, device=device)

    # The linear form ---------------------------------------------------------------------------------------------

    def held_scan(self, read: Read) -> SelectiveScan:
        u, dt, B, C = (read(f"hook_{name}") for name in ("x", "dt", "B", "C"))
        return SelectiveScan(u.unsqueeze(-1), dt, self.A, B.unsqueeze(2), C.unsqueeze(2), at_least_fp32(self.D))

    def token_path(self, read: Read) -> TokenPath:
        return TokenPath.silu(self.conv1d, *(read(f"hook_{name}") for name in ("x_pre", "conv", "x")))

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"]:
        return at_least_fp32(read("hook_gate"))

    def history(self, before: BranchState | None, path: TokenPath) -> Float[Tensor, "b k E"]:
        return super().history(before, path) if before is None else at_least_fp32(before[0])

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        biases = (self.in_proj.bias, self.conv1d.bias, self.out_proj.bias)
        return list(zip(("hook_in_proj", "hook_conv", "hook_out_proj"), biases, strict=True))

    def rule_hooks(
        self, rule: str, shares: tuple[float, float, float], read: Read, mask: Tensor | None, h0: Tensor | None
    ) -> Hooks:
        def part(which: int) -> Tensor:
            """B (0) or C (1) as x_proj gives it, the divisor of its norm held."""
            N = self.cfg.d_state
            first = self.cfg.R + which * N
            raw = read("hook_x_proj")[..., first : first + N]
            scale = torch.ones_like(raw[..., :1])
            if self.cfg.mixer_norms:
                scale = torch.rsqrt(raw.square().mean(-1, keepdim=True) + self.cfg.mixer_norm_eps).detach()
            return raw * scale

        linear = {"linear_B": lambda B: part(0), "linear_C": lambda C: part(1)}
        return selective_rule_hooks(rule, shares, read, mask, h0, scan=self.held_scan, **linear)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights as the paper's code draws them: A = -(1..N), dt log-uniform, projections Kaiming-uniform."""
        cfg = self.cfg
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            uniform_fan_in(layer.weight, layer.in_features, generator)
            if layer.bias is not None:
                layer.bias.zero_()
        self.out_proj.weight /= math.sqrt(cfg.n_layers)
        for parameter in self.conv1d.parameters():
            uniform_fan_in(parameter, cfg.d_conv, generator)
        uniform_fan_in(self.dt_proj.weight, cfg.R, generator)
        self.dt_proj.bias.copy_(initial_dt_bias(cfg, self.dt_proj.bias, generator))
        self.A_log.copy_(torch.arange(1, cfg.d_state + 1).to(self.A_log).log().expand_as(self.A_log))
        self.D.fill_(1)
        if cfg.mixer_norm_weights:
            for weight in (self.dt_norm_weight, self.B_norm_weight, self.C_norm_weight):
                weight.fill_(1)
