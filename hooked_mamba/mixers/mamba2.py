"""The Mamba-2 mixer (Dao & Gu 2024, arXiv:2405.21060, section 7).

Glossary
    b, l  batch, positions     H  heads      P  channels of a head (E = H P)     N  d_state
    K     taps                 G  groups of heads that share B and C             d  d_model
    A_bar = exp(dt A), one per head   B_bar = dt B   h_t = A_bar_t h_{t-1} + x_t B_bar_t^T   y_t = h_t C_t + D x_t
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import GroupedRMSNorm, Linear, at_least_fp32, conv_silu, silu, softplus
from hooked_mamba.config import Mamba2Config
from hooked_mamba.frozen.linear import Project
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Hooks, Read, hold, linear_silu
from hooked_mamba.mixers.precision import initial_dt_bias, uniform_fan_in
from hooked_mamba.mixers.selective_rules import RULE_SITES, selective_rule_hooks
from hooked_mamba.mixers.states import linear_scan_through_hooks, scan_through_hooks
from hooked_mamba.mixers.weight_views import Mamba2Views
from hooked_mamba.state import BranchState, Call, LayerState, columns_read, with_history, zero_padding


class Mamba2Mixer(Mamba2Views, Branch):
    """in_proj -> conv -> state-space dual -> gated norm -> out_proj, with a hook point at every site."""

    kind = "mamba2"
    packs = True
    title = "Mamba-2"
    place = "mixer"
    config_class = Mamba2Config
    keep_float32 = ("A_log", "D", "dt_bias")
    sites = (
        Site("hook_in_proj", "b l E+C+H", "whole projection, before the split"),
        Site("hook_x_pre", "b l C", "convolution input"),
        Site("hook_z", "b l E", "gate branch, before SiLU"),
        Site("hook_conv", "b l C", "convolution output, before SiLU", also=("hook_conv",)),
        Site("hook_x", "b l H P", "SSM input, after SiLU", also=("hook_ssm_input",)),
        Site(
            "hook_dt_pre",
            "b l H",
            "step size before softplus, bias included",
            wide=True,
            also=("hook_ssm_dt", "hook_delta_2"),
        ),
        Site("hook_dt", "b l H", "step size dt, after softplus and clamp", wide=True, also=("hook_delta",)),
        Site("hook_B", "b l G N", "input selection B, as the scan sees it", also=("hook_B",)),
        Site("hook_C", "b l G N", "output selection C, as the scan sees it", also=("hook_C",)),
        Site("hook_A_bar", "b l H", "decay exp(dt A)", kind="lazy", wide=True, default=True, also=("hook_A_bar",)),
        Site("hook_B_bar", "b l H N", "dt B (Euler)", kind="lazy", wide=True, default=True, also=("hook_B_bar",)),
        Site("hook_Bx", "b l H P N", "what is written into the state", kind="lazy", wide=True),
        Site(
            "hook_h",
            "b l H P N",
            "states as read: an edit changes what position t reads out, not later states",
            kind="state",
            wide=True,
            single="the state right after position t: an edit affects all later positions",
            also=("hook_h",),
        ),
        Site("hook_y_scan", "b l H P", "C h, before the D skip"),
        Site("hook_skip", "b l H P", "D x"),
        Site("hook_y", "b l H P", "scan output with the skip", also=("hook_ssm_output",)),
        Site("hook_gate", "b l E", "SiLU(z)"),
        Site("hook_y_gated", "b l E", "y * gate", also=("hook_after_skip",)),
        Child(
            "norm",
            GroupedRMSNorm,
            symbols={"w": "E"},
            texts={
                "hook_scale": "the gated norm's divisor, per group",
                "hook_normalized": "y_gated / scale, before the weight",
                "hook_out": "after the weight: what out_proj reads",
            },
        ),
        Site(
            "hook_out_proj",
            "b l d",
            "mixer output, into the residual stream",
            also=("hook_out_proj", "hook_ssm_out"),
        ),
    )

    frozen_sites = (*(f"hook_{site}" for site in ("x_pre", "conv", "x", "dt", "B", "C", "gate")), "norm.hook_scale")
    places: ClassVar = {"p": "hook_x_pre", "u": "hook_x", "y": "hook_y", "write": "hook_Bx", "state": "hook_h"}
    vectors_site = "norm.hook_out"
    inner_norms: tuple[tuple[str, str], ...] = (("norm.weight", "out_proj.weight"),)
    rule_sites = (*RULE_SITES, "norm.hook_scale")

    def __init__(self, cfg: Mamba2Config, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        E, H, d = cfg.E, cfg.H, cfg.d_model
        self.in_proj = Linear(d, E + cfg.conv_dim + H, bias=cfg.use_bias)
        self.reach = cfg.d_conv
        self.conv1d = nn.Conv1d(cfg.conv_dim, cfg.conv_dim, cfg.d_conv, groups=cfg.conv_dim, bias=cfg.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        if cfg.gated_norm != "none":
            self.norm = GroupedRMSNorm(E, cfg.gated_norm_eps, cfg.gated_norm_groups)
        self.out_proj = Linear(E, d, bias=cfg.has_out_bias)
        self.value_rows, self.head_width = slice(E, 2 * E), cfg.P
        self._factors: Tensor | None = None
        if cfg.gated_norm != "gate_first":
            self.vectors_site = "hook_y_gated"
        if cfg.gated_norm == "none":
            self.inner_norms = ()
            self.frozen_sites = tuple(site for site in self.frozen_sites if not site.startswith("norm."))
            self.rule_sites = tuple(site for site in self.rule_sites if not site.startswith("norm."))

        self.add_sites()

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        return {"d": cfg.d_model, "E": cfg.E, "H": cfg.H, "P": cfg.P, "G": cfg.G, "N": cfg.d_state, "C": cfg.conv_dim}

    def facts(self) -> tuple[tuple[str, object], ...]:
        cfg = self.cfg
        heads = ("heads H × channels P", f"{cfg.H} × {cfg.P}"), ("groups G", cfg.G)
        return ("channels E", cfg.E), *heads, ("states N", cfg.d_state), ("convolution taps K", cfg.d_conv)

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], LayerState]:
        cfg = self.cfg
        E, H, GN = cfg.E, cfg.H, cfg.G * cfg.d_state
        padding, documents = (None, None) if call is None else (call.padding, call.documents)
        real = zero_padding(padding)
        # An empty memory is None: some kernels start from no other.
        past, h0 = (self.empty_history(len(resid)), None) if state is None else state

        zxBCdt = self.in_proj(resid)
        zxBCdt = self.hook_in_proj(zxBCdt if cfg.in_scales is None else zxBCdt * self.in_factors())
        z, xBC, dt_pre = zxBCdt.split([E, cfg.conv_dim, H], -1)
        xBC = self.hook_x_pre(real(xBC))
        z = self.hook_z(z)

        xBC, before, history = with_history(xBC, past, padding, documents)
        x, B, C = conv_silu(xBC, before, self.conv1d, self.hook_conv, documents).split([E, GN, GN], -1)
        x = self.hook_x(real(x.unflatten(-1, (H, cfg.P))))
        dt_pre = self.hook_dt_pre(at_least_fp32(dt_pre) + self.dt_bias)
        dt = softplus(dt_pre)
        dt = self.hook_dt(real(dt if cfg.dt_limit == (0, math.inf) else dt.clamp(*cfg.dt_limit)))
        B, C = self.hook_B(B.unflatten(-1, (cfg.G, -1))), self.hook_C(C.unflatten(-1, (cfg.G, -1)))

        y_scan, h = self.ssm(x, dt, B, C, h0)
        y_scan = self.hook_y_scan(y_scan)
        skip = self.hook_skip((self.D.unsqueeze(-1) * x).to(x.dtype))
        y = self.hook_y(y_scan + skip)

        gate = self.hook_gate(silu(z))
        y = y.flatten(2)
        if cfg.gated_norm == "gate_first":
            out = self.norm(self.hook_y_gated(y * gate))
        else:
            out = self.hook_y_gated((self.norm(y) if cfg.gated_norm == "norm_first" else y) * gate)
        return self.hook_out_proj(self.out_proj(columns_read(out, call))), LayerState(history, h)

    def in_factors(self) -> Float[Tensor, " inner"]:
        """`in_scales`, one for each row of in_proj."""
        cfg, like = self.cfg, self.in_proj.weight
        assert cfg.in_scales is not None  # asked for only where there are some
        if self._factors is None or (self._factors.dtype, self._factors.device) != (like.dtype, like.device):
            widths = (cfg.E, cfg.E, cfg.G * cfg.d_state, cfg.G * cfg.d_state, cfg.H)
            factors = [f for factor, width in zip(cfg.in_scales, widths, strict=True) for f in [factor] * width]
            self._factors = torch.tensor(factors, dtype=like.dtype, device=like.device)
        return self._factors

    def ssm(
        self,
        x: Float[Tensor, "b l H P"],
        dt: Float[Tensor, "b l H"],
        B: Float[Tensor, "b l G N"],
        C: Float[Tensor, "b l G N"],
        h0: Float[Tensor, "b H P N"] | None,
    ) -> tuple[Float[Tensor, "b l H P"], Float[Tensor, "b H P N"]]:
        """C h for every position, without the skip, and the last state."""
        A = self.A
        heads_per_group = self.cfg.H // self.cfg.G

        def of_heads(v: Tensor) -> Tensor:
            return repeat(v, "b l g n -> b l (g r) n", r=heads_per_group)

        def A_bar_at(t: list[int] | slice) -> Tensor:
            return torch.exp(dt[:, t] * A)

        def B_bar_at(t: list[int] | slice) -> Tensor:
            return dt[:, t].unsqueeze(-1) * of_heads(B[:, t])

        def Bx_at(t: list[int] | slice) -> Tensor:
            return x[:, t].unsqueeze(-1) * B_bar_at(t).unsqueeze(-2)

        def read_out(h: Tensor, t: slice) -> Tensor:
            return torch.einsum("blhpn,blhn->blhp", h, of_heads(C[:, t]).to(h.dtype)).to(x.dtype)

        if self.discrete_sites_edited:
            everything = slice(None)
            A_bar = self.hook_A_bar(A_bar_at(everything))
            B_bar = self.hook_B_bar(B_bar_at(everything))
            Bx = self.hook_Bx(x.unsqueeze(-1) * B_bar.unsqueeze(-2))
            h, h_last = linear_scan_through_hooks(self.hook_h, A_bar[..., None, None], Bx, h0)
            return read_out(self.hook_h(h), everything), h_last

        self.hook_A_bar.read(x.shape[1], A_bar_at)
        self.hook_B_bar.read(x.shape[1], B_bar_at)
        self.hook_Bx.read(x.shape[1], Bx_at)

        # Settled for the whole call: positions before an edited state must keep every bit.
        chunk, everywhere = ops.default_chunk(x.shape[1]), slice(0, x.shape[1])

        def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ops.ScanOut:
            here = (x, dt, B, C) if t == everywhere else (v[:, t] for v in (x, dt, B, C))
            u, step, B_t, C_t = here
            return ops.ssd(u, step, A, B_t, C_t, h0=h, states_at=states_at, chunk=chunk)

        return scan_through_hooks(self.hook_h, x.shape[1], h0, scan, read_out)

    @property
    def discrete_sites_edited(self) -> bool:
        """Whether a hook sits on A_bar, B_bar, Bx or the stacked h, so that the recurrence must run unfused.

        An edited A_bar may be 0, which has no logarithm, so the fused scan could not take it.
        """
        return any(site.edited for site in (self.hook_A_bar, self.hook_B_bar, self.hook_Bx, self.hook_h))

    @property
    def A(self) -> Float[Tensor, " H"]:
        """Continuous-time decay rates, negative, one per head."""
        return -torch.exp(at_least_fp32(self.A_log))

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> LayerState:
        """The empty memory, where the weights are; on "meta" its shapes alone."""
        cfg = self.cfg
        ssm = self.A_log.new_zeros(batch, cfg.H, cfg.P, cfg.d_state, device=device)
        return LayerState(self.empty_history(batch, device), ssm)

    def empty_history(self, batch: int, device: torch.device | str | None = None) -> Float[Tensor, "b k c"]:
        """The convolution's inputs before the first position."""
        return self.in_proj.weight.new_zeros(batch, self.cfg.d_conv - 1, self.cfg.conv_dim, device=device)

    # The linear form ---------------------------------------------------------------------------------------------

    def held_scan(self, read: Read) -> SelectiveScan:
        u, dt, B, C = (read(f"hook_{name}") for name in ("x", "dt", "B", "C"))
        return SelectiveScan(u, dt, self.A.unsqueeze(-1), B, C, at_least_fp32(self.D))

    def token_path(self, read: Read) -> TokenPath:
        return TokenPath.silu(self.conv1d, *(read(f"hook_{name}") for name in ("x_pre", "conv", "x")))

    def value_input(self) -> Project:
        own, scales = super().value_input(), self.cfg.in_scales
        if scales is None:
            return own
        return Project(own.W * scales[1], None if own.b is None else own.b * scales[1])

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"]:
        """The gate, and the gated norm's weight and divisor."""
        if self.cfg.gated_norm == "none":
            return at_least_fp32(read("hook_gate"))
        scale = read("norm.hook_scale")
        gain = at_least_fp32(read("hook_gate")) * self.norm.weight
        grouped = rearrange(gain, "b l (g w) -> b l g w", g=scale.shape[2]) / scale
        return rearrange(grouped, "b l g w -> b l (g w)")

    def write_weight(self) -> Float[Tensor, "d E"]:
        return self.out_proj.weight if self.cfg.gated_norm == "none" else self.out_proj.weight * self.norm.weight

    def history(self, before: BranchState | None, path: TokenPath) -> Float[Tensor, "b k E"]:
        return super().history(before, path) if before is None else at_least_fp32(before[0][..., : self.cfg.E])

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        biases = (self.in_proj.bias, self.conv1d.bias, self.out_proj.bias)
        return list(zip(("hook_in_proj", "hook_conv", "hook_out_proj"), biases, strict=True))

    def rule_hooks(
        self, rule: str, shares: tuple[float, float, float], read: Read, mask: Tensor | None, h0: Tensor | None
    ) -> Hooks:
        def part(which: int, value: Tensor) -> Tensor:
            """B (0) or C (1), SiLU's factor held."""
            width = value.shape[2:].numel()
            first = self.cfg.E + which * width
            return linear_silu(read("hook_conv")[..., first : first + width]).reshape(value.shape)

        linear = {"linear_B": lambda B: part(0, B), "linear_C": lambda C: part(1, C)}
        hooks = selective_rule_hooks(rule, shares, read, mask, h0, scan=self.held_scan, **linear)
        return [*hooks, ("norm.hook_scale", hold)]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights as the paper's code draws them: -A uniform, dt log-uniform, projections Kaiming-uniform."""
        cfg = self.cfg
        for linear in (self.in_proj, self.out_proj):
            uniform_fan_in(linear.weight, linear.in_features, generator)
            if linear.bias is not None:
                linear.bias.zero_()
        self.out_proj.weight /= math.sqrt(cfg.n_layers)
        for parameter in self.conv1d.parameters():
            uniform_fan_in(parameter, cfg.d_conv, generator)
        self.dt_bias.copy_(initial_dt_bias(cfg, self.dt_bias, generator))
        self.A_log.uniform_(*cfg.A_init_range, generator=generator).log_()
        self.D.fill_(1)
        if cfg.gated_norm != "none":
            self.norm.weight.fill_(1)
