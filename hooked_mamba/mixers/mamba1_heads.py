"""The Mamba-1 mixer of Zamba (Glorioso et al. 2024, arXiv:2405.16712): heads with their own selection.

The channels are G heads of E / G. Each computes its dt, B and C from its own channels with its own weights; in_proj,
the convolution and out_proj are shared.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba import ops
from hooked_mamba.components import at_least_fp32, conv_silu, silu, softplus
from hooked_mamba.config import HeadedMambaConfig
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.hooks.site import Site
from hooked_mamba.mixers.linear_form import Read
from hooked_mamba.mixers.mamba1 import Mamba1Mixer
from hooked_mamba.mixers.precision import initial_dt_bias, uniform_fan_in
from hooked_mamba.mixers.states import linear_scan_through_hooks, scan_through_hooks
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.state import BranchState, Call, LayerState, with_history, zero_padding

SHAPES = {"hook_x_proj": "b l G R+2N", "hook_dt_low": "b l G R", "hook_B": "b l G N", "hook_C": "b l G N"}
"""The sites that have an axis of heads here."""


class HeadedMamba1Mixer(Mamba1Mixer):
    """Mamba-1 whose heads each have their own x_proj and dt_proj."""

    kind = "mamba_heads"
    packs = True
    title = "Mamba-1 with heads"
    place = "mixer"
    config_class = HeadedMambaConfig
    keep_float32 = ("A_log", "D", "dt_proj_bias")
    sites = tuple(
        replace(row, shape=SHAPES.get(row.name, row.shape)) for row in Mamba1Mixer.sites if isinstance(row, Site)
    )
    cfg: HeadedMambaConfig

    def __init__(self, cfg: HeadedMambaConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        G, e = cfg.n_heads, cfg.E // cfg.n_heads
        del self.x_proj, self.dt_proj
        self.x_proj_weight = nn.Parameter(torch.empty(G, cfg.R + 2 * cfg.d_state, e))
        self.dt_proj_weight = nn.Parameter(torch.empty(G, e, cfg.R))
        self.dt_proj_bias = nn.Parameter(torch.empty(cfg.E))

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "G": self.cfg.n_heads}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return (*super().facts(), ("heads with a selection of their own", self.cfg.n_heads))

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b l d"], LayerState]:
        E, N, R, G = self.cfg.E, self.cfg.d_state, self.cfg.R, self.cfg.n_heads
        padding, documents = (None, None) if call is None else (call.padding, call.documents)
        real = zero_padding(padding)
        past, h0 = (self.empty_history(len(resid)), None) if state is None else state

        xz = self.hook_in_proj(self.in_proj(resid))
        x = self.hook_x_pre(real(xz[..., :E]))
        z = self.hook_z(xz[..., E:])
        x, before, history = with_history(x, past, padding, documents)
        x = self.hook_x(real(conv_silu(x, before, self.conv1d, self.hook_conv, documents)))

        heads = rearrange(x, "b l (g e) -> b l g e", g=G)
        x_proj = self.hook_x_proj(torch.einsum("blge,gwe->blgw", heads, self.x_proj_weight))
        dt_low, B, C = x_proj.split([R, N, N], -1)
        dt_low = self.hook_dt_low(dt_low)
        dt_pre = torch.einsum("blgr,ger->blge", dt_low, self.dt_proj_weight).flatten(2)
        dt_pre = self.hook_dt_pre(at_least_fp32(dt_pre) + self.dt_proj_bias)
        dt = self.hook_dt(real(softplus(dt_pre)))
        B, C = self.hook_B(B), self.hook_C(C)

        y_scan, h = self.ssm(x, dt, B, C, h0)
        y_scan = self.hook_y_scan(y_scan)
        skip = self.hook_skip((self.D * x).to(x.dtype))
        y = self.hook_y(y_scan + skip)
        y_gated = self.hook_y_gated(y * self.hook_gate(silu(z)))
        return self.hook_out_proj(self.out_proj(y_gated)), LayerState(history, h)

    def ssm(
        self,
        x: Float[Tensor, "b l E"],
        dt: Float[Tensor, "b l E"],
        B: Float[Tensor, "b l G N"],
        C: Float[Tensor, "b l G N"],
        h0: Float[Tensor, "b E N"] | None,
    ) -> tuple[Float[Tensor, "b l E"], Float[Tensor, "b E N"]]:
        A, width = self.A, self.cfg.E // self.cfg.n_heads

        def of_channels(v: Tensor) -> Tensor:
            return v.repeat_interleave(width, 2)

        def A_bar_at(t: list[int] | slice) -> Tensor:
            return torch.exp(dt[:, t].unsqueeze(-1) * A)

        def B_bar_at(t: list[int] | slice) -> Tensor:
            return dt[:, t].unsqueeze(-1) * of_channels(B[:, t])

        def Bx_at(t: list[int] | slice) -> Tensor:
            return B_bar_at(t) * x[:, t].unsqueeze(-1)

        def read_out(h: Tensor, t: slice) -> Tensor:
            return torch.einsum("blen,blen->ble", h, of_channels(C[:, t]).to(h.dtype)).to(x.dtype)

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

        def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ScanOut:
            outs = []
            for g in range(self.cfg.n_heads):
                e = slice(g * width, (g + 1) * width)
                u, step = x[:, t, e].contiguous(), dt[:, t, e].contiguous()
                start = None if h is None else h[:, e].contiguous()
                outs.append(ops.selective_scan(u, step, A[e], B[:, t, g], C[:, t, g], h0=start, states_at=states_at))
            states = None if outs[0].states is None else torch.cat([out.states for out in outs], 2)  # type: ignore[misc]
            return ScanOut(torch.cat([out.y for out in outs], 2), torch.cat([out.h_last for out in outs], 1), states)

        return scan_through_hooks(self.hook_h, x.shape[1], h0, scan, read_out)

    def held_scan(self, read: Read) -> SelectiveScan:
        u, dt, B, C = (read(f"hook_{name}") for name in ("x", "dt", "B", "C"))
        return SelectiveScan(u.unsqueeze(-1), dt, self.A, B, C, at_least_fp32(self.D))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        cfg = self.cfg
        for layer in (self.in_proj, self.out_proj):
            uniform_fan_in(layer.weight, layer.in_features, generator)
            if layer.bias is not None:
                layer.bias.zero_()
        self.out_proj.weight /= cfg.n_layers**0.5
        for parameter in self.conv1d.parameters():
            uniform_fan_in(parameter, cfg.d_conv, generator)
        for weight in (self.x_proj_weight, self.dt_proj_weight):
            uniform_fan_in(weight, weight.shape[-1], generator)
        self.dt_proj_bias.copy_(initial_dt_bias(cfg, self.dt_proj_bias, generator))
        self.A_log.copy_(torch.arange(1, cfg.d_state + 1).to(self.A_log).log().expand_as(self.A_log))
        self.D.fill_(1)
