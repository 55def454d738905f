"""The Mamba-2 mixer (Dao & Gu 2024, arXiv:2405.21060, section 7).

Glossary
    b, l  batch, positions     H  heads      P  channels of a head (E = H P)     N  d_state
    K     taps                 G  groups of heads that share B and C             d  d_model
    A_bar = exp(dt A), one number a head   B_bar = dt B   h_t = A_bar_t h_{t-1} + x_t B_bar_t^T   y_t = h_t C_t + D x_t
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import Linear, RMSNorm, at_least_fp32, conv_silu, silu, softplus
from hooked_mamba.config import Mamba2Config
from hooked_mamba.hook_points import HookPoint, LazyHookPoint, StateHookPoint
from hooked_mamba.mixers.precision import KeepsFloat32, initial_dt_bias, uniform_fan_in
from hooked_mamba.mixers.states import linear_scan_through_hooks, scan_through_hooks
from hooked_mamba.state import LayerState, Padding, with_history, zero_padding


class Mamba2Mixer(KeepsFloat32, nn.Module):
    """in_proj -> conv -> state-space dual -> gated norm -> out_proj, with a hook point at every site."""

    keep_float32 = ("A_log", "D", "dt_bias")

    def __init__(self, cfg: Mamba2Config) -> None:
        super().__init__()
        self.cfg = cfg
        E, H, d = cfg.E, cfg.H, cfg.d_model
        self.in_proj = Linear(d, E + cfg.conv_dim + H, bias=cfg.use_bias)
        self.conv1d = nn.Conv1d(cfg.conv_dim, cfg.conv_dim, cfg.d_conv, groups=cfg.conv_dim, bias=cfg.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(E, cfg.gated_norm_eps, groups=cfg.norm_groups)
        self.out_proj = Linear(E, d, bias=cfg.use_bias)

        self.hook_in_proj = HookPoint()
        self.hook_x_pre = HookPoint()
        self.hook_z = HookPoint()
        self.hook_conv = HookPoint()
        self.hook_x = HookPoint()
        self.hook_dt_pre = HookPoint()
        self.hook_dt = HookPoint()
        self.hook_B = HookPoint()
        self.hook_C = HookPoint()
        self.hook_A_bar = LazyHookPoint()
        self.hook_B_bar = LazyHookPoint()
        self.hook_Bx = LazyHookPoint()
        self.hook_h = StateHookPoint()
        self.hook_y_scan = HookPoint()
        self.hook_skip = HookPoint()
        self.hook_y = HookPoint()
        self.hook_gate = HookPoint()
        self.hook_y_gated = HookPoint()
        self.hook_out_proj = HookPoint()

    def forward(
        self, resid: Float[Tensor, "b l d"], state: LayerState | None = None, padding: Padding | None = None
    ) -> tuple[Float[Tensor, "b l d"], LayerState]:
        """Normalised residual in, what is added to the residual stream out, and the memory for the next call."""
        cfg = self.cfg
        E, H, GN = cfg.E, cfg.H, cfg.G * cfg.d_state
        real = zero_padding(padding)
        h0 = None if state is None else state.ssm  # an empty memory is None: some kernels start from no other
        past = self.empty_history(len(resid)) if state is None else state.conv

        zxBCdt = self.hook_in_proj(self.in_proj(resid))
        z, xBC, dt_pre = zxBCdt.split([E, cfg.conv_dim, H], -1)
        xBC = self.hook_x_pre(real(xBC))
        z = self.hook_z(z)

        xBC, before, history = with_history(xBC, past, padding)
        x, B, C = conv_silu(xBC, before, self.conv1d, self.hook_conv).split([E, GN, GN], -1)
        x = self.hook_x(real(rearrange(x, "b l (h p) -> b l h p", h=H)))
        dt_pre = self.hook_dt_pre(at_least_fp32(dt_pre) + self.dt_bias)
        dt = self.hook_dt(real(softplus(dt_pre).clamp(*cfg.dt_limit)))
        B = self.hook_B(rearrange(B, "b l (g n) -> b l g n", g=cfg.G))
        C = self.hook_C(rearrange(C, "b l (g n) -> b l g n", g=cfg.G))

        y_scan, h = self.ssm(x, dt, B, C, h0)
        y_scan = self.hook_y_scan(y_scan)
        skip = self.hook_skip((self.D.unsqueeze(-1) * x).to(x.dtype))
        y = self.hook_y(y_scan + skip)

        gate = self.hook_gate(silu(z))
        y_gated = self.hook_y_gated(rearrange(y, "b l h p -> b l (h p)") * gate)
        return self.hook_out_proj(self.out_proj(self.norm(y_gated))), LayerState(history, h)

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
        chunk = ops.default_chunk(x.shape[1])

        def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ops.ScanOut:
            return ops.ssd(x[:, t], dt[:, t], A, B[:, t], C[:, t], h0=h, states_at=states_at, chunk=chunk)

        return scan_through_hooks(self.hook_h, x.shape[1], h0, scan, read_out)

    @property
    def discrete_sites_edited(self) -> bool:
        """Whether a function sits on A_bar, B_bar, Bx or the stacked h, so that they must be formed in line.

        An edited A_bar may be 0, which has no logarithm: the fused scan could not take it.
        """
        return any(site.edited for site in (self.hook_A_bar, self.hook_B_bar, self.hook_Bx, self.hook_h))

    @property
    def A(self) -> Float[Tensor, " H"]:
        """Continuous-time decay rates, negative, one a head."""
        return -torch.exp(at_least_fp32(self.A_log))

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> LayerState:
        """The empty memory, where the weights are; on "meta" its shapes alone."""
        cfg = self.cfg
        ssm = self.A_log.new_zeros(batch, cfg.H, cfg.P, cfg.d_state, device=device)
        return LayerState(self.empty_history(batch, device), ssm)

    def empty_history(self, batch: int, device: torch.device | str | None = None) -> Float[Tensor, "b k c"]:
        """The convolution's inputs before the first position."""
        return self.in_proj.weight.new_zeros(batch, self.cfg.d_conv - 1, self.cfg.conv_dim, device=device)

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
        self.norm.weight.fill_(1)
