"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464).

Glossary
    b, l  batch, positions     G  key heads     H  value heads     K, V  keys, values of a head     C  channels q, k, v
    q', k', v' = SiLU(conv(W x))      q = q' / |q'| K^{-1/2}      k = k' / |k'|      lengths as sqrt(sum x^2 + 1e-6)
    beta = sigmoid(W_b x)             dt = softplus(W_a x + dt_bias)                 A_bar = exp(-exp(A_log) dt)
    u_t = beta_t (v_t - recall_t)     recall_t = A_bar_t S_{t-1} k_t                 the removal reads the decayed state
    S_t = A_bar_t S_{t-1} + u_t k_t^T         y_t = S_t q_t
    out = W_o (norm_V(y) act(z))              z = W_z x
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.components import Linear, at_least_fp32, conv_silu, silu, softplus
from hooked_mamba.frozen.delta import DeltaScan
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Child, Site
from hooked_mamba.hooks.sited import SitedModule
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.delta_states import (
    DeltaInputs,
    closed_loop_recall,
    delta_scan_through_hooks,
    given_recall_through_hooks,
)
from hooked_mamba.mixers.linear_form import Read
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.recurrent_config import DeltaNetConfig
from hooked_mamba.state import BranchState, Call, columns_read, loadable, with_history, zero_padding

LENGTH_EPS = 1e-6
"""Added to the sum of squares of q' and k', inside the root."""


@loadable
class DeltaNetState(NamedTuple):
    """Memory of a gated DeltaNet mixer."""

    conv: Tensor
    """The last d_conv - 1 inputs of the convolution, b K-1 C."""
    ssm: Tensor
    """S, b H V K, float32, or float64 in a float64 model."""


class HeadRMSNorm(SitedModule):
    """RMSNorm of each head by itself, with one weight of V numbers for all."""

    sites = (
        Site("hook_scale", "b l H 1", "the divisor sqrt(mean y^2 + eps) of each head", wide=True),
        Site("hook_normalized", "b l H V", "y / scale of each head, before the weight", wide=True),
        Site("hook_out", "b l H V", "after the weight"),
    )

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "V": self.weight.shape[0]}

    def forward(self, y: Float[Tensor, "b l H V"]) -> Float[Tensor, "b l H V"]:
        y = at_least_fp32(y)
        scale = self.hook_scale((y.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(y / scale)
        return self.hook_out((normalized * self.weight).to(self.weight.dtype))


class GatedDeltaNet(Branch):
    """projections -> conv -> lengths -> delta rule -> norm of heads -> gate -> output."""

    kind = "gated_deltanet"
    packs = True
    title = "Gated DeltaNet"
    place = "mixer"
    config_class = DeltaNetConfig
    keep_float32 = ("A_log", "dt_bias")
    sites = (
        Site("hook_x_pre", "b l C", "convolution input: q, k and v"),
        Site("hook_conv", "b l C", "convolution output, before SiLU"),
        Site("hook_q_pre", "b l G K", "queries after SiLU, before they get their length"),
        Site("hook_k_pre", "b l G K", "keys after SiLU, before they get length 1"),
        Site("hook_q", "b l G K", "queries: what the state is read with", also=("hook_C",)),
        Site("hook_k", "b l G K", "keys of write and removal, of length 1", also=("hook_B",)),
        Site("hook_v", "b l H V", "values, as the delta rule takes them", also=("hook_x",)),
        Site("hook_dt_pre", "b l H", "step size before softplus, bias included", wide=True),
        Site("hook_dt", "b l H", "step size dt, after softplus", wide=True),
        Site("hook_A_bar", "b l H", "decay exp(-exp(A_log) dt)", wide=True),
        Site("hook_beta_pre", "b l H", "writing strength before its sigmoid", wide=True),
        Site("hook_beta", "b l H", "writing strength beta", wide=True),
        Site("hook_recall", "b l H V", "A_bar S_{t-1} k: what lay under the key, decayed", kind="lazy", default=True),
        Site("hook_delta", "b l H V", "u = beta (v - recall): what is written", kind="lazy", default=True),
        Site("hook_Bx", "b l H V K", "what is written into the state, u k^T", kind="lazy", wide=True),
        Site(
            "hook_h",
            "b l H V K",
            "states as read: an edit changes what position t reads out, not later states",
            kind="state",
            wide=True,
            single="the state right after position t: an edit is carried forward, and later removals read it",
        ),
        Site("hook_y_scan", "b l H V", "S q"),
        Child("norm", HeadRMSNorm),
        Site("hook_z", "b l H V", "gate branch, before its activation"),
        Site("hook_gate", "b l H V", "gate"),
        Site("hook_y_gated", "b l H V", "normed output * gate"),
        Site("hook_out_proj", "b l d", "mixer output, into the residual stream"),
    )

    def __init__(self, cfg: DeltaNetConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        d, H = cfg.d_model, cfg.n_value_heads
        self.in_proj = Linear(d, cfg.conv_dim, bias=False)
        if cfg.d_conv:
            self.reach = cfg.d_conv
            self.conv1d = nn.Conv1d(cfg.conv_dim, cfg.conv_dim, cfg.d_conv, groups=cfg.conv_dim, bias=cfg.conv_bias)
        if cfg.gate != "none":
            self.z_proj = Linear(d, cfg.E, bias=False)
        self.a_proj = Linear(d, H, bias=False)
        self.b_proj = Linear(d, H, bias=False)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.norm = HeadRMSNorm(H, cfg.value_dim, cfg.norm_eps)
        self.out_proj = Linear(cfg.E, d, bias=False)
        self.value_rows, self.head_width = slice(cfg.conv_dim - cfg.E, cfg.conv_dim), cfg.value_dim
        self.frozen_sites = (*type(self).frozen_sites, *["hook_conv"] * bool(cfg.d_conv))
        if cfg.gate != "none":
            self.frozen_sites += ("hook_gate",)
            self.norm_readers = (*type(self).norm_readers, "z_proj.weight")
        self.add_sites()

    def site_rows(self) -> tuple[Site | Child, ...]:
        absent = set() if self.cfg.d_conv else {"hook_conv"}
        absent |= {"hook_z", "hook_gate"} if self.cfg.gate == "none" else set()
        return tuple(row for row in type(self).sites if row.name not in absent)

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        heads = {"G": cfg.n_key_heads, "H": cfg.n_value_heads, "K": cfg.key_dim, "V": cfg.value_dim}
        return {"d": cfg.d_model, "C": cfg.conv_dim, **heads}

    def facts(self) -> tuple[tuple[str, object], ...]:
        cfg = self.cfg
        return ("key heads × keys", f"{cfg.n_key_heads} × {cfg.key_dim}"), (
            "value heads × values",
            f"{cfg.n_value_heads} × {cfg.value_dim}",
        )

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], DeltaNetState]:
        cfg = self.cfg
        padding, documents = (None, None) if call is None else (call.padding, call.documents)
        real = zero_padding(padding)
        past, S = (self.empty_history(len(resid)), None) if state is None else state

        qkv = self.hook_x_pre(real(self.in_proj(resid)))
        if cfg.d_conv:
            qkv, before, history = with_history(qkv, past, padding, documents)
            qkv = conv_silu(qkv, before, self.conv1d, self.hook_conv, documents)
            qkv = qkv[:, qkv.shape[1] - resid.shape[1] :]
        else:
            qkv, history = silu(qkv), past
        q, k, v = qkv.split([cfg.n_key_heads * cfg.key_dim] * 2 + [cfg.E], -1)
        q = self.hook_q_pre(rearrange(q, "b l (g k) -> b l g k", k=cfg.key_dim))
        k = self.hook_k_pre(rearrange(k, "b l (g k) -> b l g k", k=cfg.key_dim))
        q = self.hook_q(of_length_one(q) * cfg.key_dim**-0.5)
        k = self.hook_k(real(of_length_one(k)))
        v = self.hook_v(rearrange(v, "b l (h v) -> b l h v", v=cfg.value_dim))

        dt_pre = self.hook_dt_pre(at_least_fp32(self.a_proj(resid)) + self.dt_bias)
        dt = self.hook_dt(real(softplus(dt_pre)))
        A_bar = self.hook_A_bar(torch.exp(-torch.exp(at_least_fp32(self.A_log)) * dt))
        beta = torch.sigmoid(self.hook_beta_pre(at_least_fp32(self.b_proj(resid))))
        beta = self.hook_beta(real(2 * beta if cfg.negative_eigenvalues else beta))

        y, S = self.delta_rule(q, k, v, A_bar, beta, S)
        y = self.norm(self.hook_y_scan(y))
        if cfg.gate != "none":
            z = self.hook_z(rearrange(self.z_proj(resid), "b l (h v) -> b l h v", v=cfg.value_dim))
            y = y * self.hook_gate(silu(z) if cfg.gate == "silu" else torch.sigmoid(z))
        y_gated = self.hook_y_gated(y)
        return self.hook_out_proj(self.out_proj(columns_read(y_gated, call).flatten(2))), DeltaNetState(history, S)

    def delta_rule(
        self,
        q: Float[Tensor, "b l G K"],
        k: Float[Tensor, "b l G K"],
        v: Float[Tensor, "b l H V"],
        A_bar: Float[Tensor, "b l H"],
        beta: Float[Tensor, "b l H"],
        S: Float[Tensor, "b H V K"] | None,
    ) -> tuple[Float[Tensor, "b l H V"], Float[Tensor, "b H V K"]]:
        """S q for every position, and the last state.

        One call of the delta scan, with A_bar on the diagonal and -A_bar beta k k^T beside it. Where a hook edits what
        is recalled or written, the loop is open: S_t = A_bar_t S_{t-1} + the write, with the returned values as given.
        """
        shared = self.cfg.n_value_heads // self.cfg.n_key_heads
        q, k = (x.repeat_interleave(shared, 2) for x in (q, k))
        w, strength = A_bar.unsqueeze(-1), beta.unsqueeze(-1).to(v.dtype)
        removal = -w * beta.unsqueeze(-1)  # times k, which the op takes as it is
        x = DeltaInputs(q, w, k, strength * v, k, removal if self.cfg.key_dim > 1 else removal * k)
        if not any(site.edited for site in (self.hook_recall, self.hook_delta, self.hook_Bx)):
            y, S, below = delta_scan_through_hooks(x, S, self.hook_h)
            recall = w.to(v.dtype) * below
            delta = strength * (v - recall) if self.hook_delta.wanted or self.hook_Bx.wanted else recall
            self.hook_recall.read(v.shape[1], lambda t: recall[:, t])
            self.hook_delta.read(v.shape[1], lambda t: delta[:, t])
            self.hook_Bx.read(v.shape[1], x._replace(v=delta).write_at)
            return y, S
        recall = self.hook_recall(w.to(v.dtype) * closed_loop_recall(x, S, self.hook_h.documents))
        delta = self.hook_delta(strength * (v - recall))
        return given_recall_through_hooks(x._replace(v=delta), None, S, self.hook_h, self.hook_Bx)

    # The linear form: A_bar, q, k, beta, the gate and the norm's divisor are held ------------------------------------

    frozen_sites = tuple(f"hook_{name}" for name in ("x_pre", "v", "q", "k", "A_bar", "beta")) + ("norm.hook_scale",)
    # No "write": hook_Bx is what is written once the removal is done, and later removals do not see an edit of it.
    places: ClassVar = {"p": "hook_x_pre", "u": "hook_v", "y": "hook_y_scan", "state": "hook_h"}
    vectors_site = "hook_y_gated"
    norm_readers: tuple[str, ...] = tuple(f"{name}.weight" for name in ("in_proj", "a_proj", "b_proj"))

    def held_scan(self, read: Read) -> DeltaScan:
        """The delta rule over v; beta is the strength of its writes."""
        cfg = self.cfg
        q, k, v, A_bar, beta = (read(f"hook_{name}") for name in ("q", "k", "v", "A_bar", "beta"))
        q, k = (x.repeat_interleave(cfg.n_value_heads // cfg.n_key_heads, 2) for x in (q, k))
        w = A_bar.unsqueeze(-1)
        return DeltaScan(v, q, w, k, k, -w * beta.unsqueeze(-1) * k, beta, removes_decayed=True)

    def token_path(self, read: Read) -> TokenPath:
        rows, u = self.value_rows, read("hook_v")
        p = read("hook_x_pre")[..., rows]
        if not self.cfg.d_conv:
            p = at_least_fp32(p)
            return TokenPath(p, torch.sigmoid(p), p.new_ones(p.shape[-1], 1), p.new_zeros(p.shape[-1]))
        weight, bias = weights_of(self.conv1d, "conv1d")
        bias = None if bias is None else bias[rows]
        return TokenPath.gated(weight[rows, 0], bias, p, read("hook_conv")[..., rows], u)

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"]:
        """The gate, and the norm's weight and divisor of each head."""
        gain = self.norm.weight / read("norm.hook_scale")
        gate = 1 if self.cfg.gate == "none" else at_least_fp32(read("hook_gate"))
        return (gain * gate).flatten(2)

    def history(self, before: BranchState | None, path: TokenPath) -> Float[Tensor, "b k E"]:
        if before is None:
            return super().history(before, path)
        return at_least_fp32(before[0][..., self.value_rows])

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        return [("hook_conv", self.conv1d.bias)] if self.cfg.d_conv else []

    def empty_history(self, batch: int, device: torch.device | str | None = None) -> Float[Tensor, "b k C"]:
        """The convolution's inputs before the first position."""
        taps = max(self.cfg.d_conv, 1)
        return self.in_proj.weight.new_zeros(batch, taps - 1, self.cfg.conv_dim, device=device)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> DeltaNetState:
        """The empty memory, where the weights are; on "meta" its shapes alone."""
        cfg = self.cfg
        S = self.A_log.new_zeros(batch, cfg.n_value_heads, cfg.value_dim, cfg.key_dim, device=device)
        return DeltaNetState(self.empty_history(batch, device), S)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights as the paper's code draws them: decay rates uniform, dt log-uniform, projections
        Kaiming-uniform."""
        cfg = self.cfg
        for linear in (m for m in self.children() if isinstance(m, Linear)):
            uniform_fan_in(linear.weight, linear.in_features, generator)
        self.out_proj.weight /= cfg.n_layers**0.5
        if cfg.d_conv:
            for parameter in self.conv1d.parameters():
                uniform_fan_in(parameter, cfg.d_conv, generator)
        self.A_log.uniform_(*cfg.A_init_range, generator=generator).log_()
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(-6.9, -2.3, generator=generator))  # 0.001 to 0.1
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus' inverse
        self.norm.weight.fill_(1)


def of_length_one(x: Float[Tensor, "b l g k"]) -> Float[Tensor, "b l g k"]:
    """x / sqrt(sum x^2 + eps), computed in float32 at least."""
    wide = at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + LENGTH_EPS)).to(x.dtype)
