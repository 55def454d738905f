"""Mixers: Mamba-1, Zamba's with heads, Mamba-2, the gated short convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.hooked_mamba.hybrids.reference.parts import Array, Part, convolve, rms, silu, softplus


def mamba1(p: Part, x: Array, N: int, norms: float | None) -> Array:
    """Mamba-1; `norms`: eps of the weighted norms of dt, B and C (Jamba)."""
    projected = p("hook_in_proj", x @ p["in_proj.weight"].T + p.bias("in_proj.bias"))
    E = projected.shape[-1] // 2
    x, z = p("hook_x_pre", projected[..., :E]), p("hook_z", projected[..., E:])
    x = p("hook_x", silu(p("hook_conv", convolve(x, p["conv1d.weight"], p.bias("conv1d.bias")))))
    low = p("hook_x_proj", x @ p["x_proj.weight"].T)
    R = low.shape[-1] - 2 * N
    dt, B, C = low[..., :R], low[..., R : R + N], low[..., R + N :]
    if norms is not None:
        dt, B, C = (
            v / np.sqrt((v**2).mean(-1, keepdims=True) + norms) * p[f"{name}_layernorm.weight"]
            for v, name in ((dt, "dt"), (B, "b"), (C, "c"))
        )
    dt = p("hook_dt_pre", p("hook_dt_low", dt) @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    dt, B, C = p("hook_dt", softplus(dt)), p("hook_B", B), p("hook_C", C)
    A_bar = p("hook_A_bar", np.exp(dt[..., None] * -np.exp(p["A_log"])))
    B_bar = p("hook_B_bar", dt[..., None] * B[:, :, None])
    h = states(A_bar, p("hook_Bx", B_bar * x[..., None]))
    y = p("hook_y_scan", (p("hook_h", h) * C[:, :, None]).sum(-1))
    y = p("hook_y", y + p("hook_skip", p["D"] * x))
    return p("hook_out_proj", p("hook_y_gated", y * p("hook_gate", silu(z))) @ p["out_proj.weight"].T)


def mamba1_heads(p: Part, x: Array, N: int) -> Array:
    """Zamba's Mamba-1: rows of x and z in turns; each head with weights of its own."""
    weight, bias = p["in_proj.weight"], p.bias("in_proj.bias")
    each = [weight[0::2], weight[1::2]]
    biases = [bias[0::2], bias[1::2]] if isinstance(bias, np.ndarray) else [bias, bias]
    projected = [x @ w.T + b for w, b in zip(each, biases, strict=True)]
    E = len(each[0])
    projected = p("hook_in_proj", np.concatenate(projected, -1))
    x, z = p("hook_x_pre", projected[..., :E]), p("hook_z", projected[..., E:])
    x = p("hook_x", silu(p("hook_conv", convolve(x, p["conv1d.weight"], p.bias("conv1d.bias")))))
    heads = np.split(x, len(p["x_proj_weight"]), -1)
    low = [h @ w.T for h, w in zip(heads, p["x_proj_weight"], strict=True)]
    low = p("hook_x_proj", np.stack(low, 2))
    R = low.shape[-1] - 2 * N
    dt = p("hook_dt_low", low[..., :R])
    rows = [dt[:, :, g] @ w.T + b for g, (w, b) in enumerate(zip(p["dt_proj_weight"], p["dt_proj_bias"], strict=True))]
    dt = p("hook_dt", softplus(p("hook_dt_pre", np.concatenate(rows, -1))))
    B, C = p("hook_B", low[..., R : R + N]), p("hook_C", low[..., R + N :])
    head = [e // (E // len(heads)) for e in range(E)]
    A_bar = p("hook_A_bar", np.exp(dt[..., None] * -np.exp(p["A_log"]).reshape(E, N)))
    B_bar = p("hook_B_bar", dt[..., None] * B[:, :, head])
    h = p("hook_h", states(A_bar, p("hook_Bx", B_bar * x[..., None])))
    y = p("hook_y_scan", (h * C[:, :, head]).sum(-1))
    y = p("hook_y", y + p("hook_skip", p["D"].reshape(E) * x))
    return p("hook_out_proj", p("hook_y_gated", y * p("hook_gate", silu(z))) @ p["out_proj.weight"].T)


def states(A_bar: Array, Bx: Array) -> Array:
    """h_t = A_bar_t h_(t-1) + Bx_t, every one of them."""
    h = np.zeros_like(Bx[:, 0])
    found = []
    for t in range(Bx.shape[1]):
        h = A_bar[:, t] * h + Bx[:, t]
        found.append(h)
    return np.stack(found, 1)


@dataclass
class Mamba2Shape:
    E: int
    H: int
    G: int
    N: int
    eps: float
    gated_norm: str = "gate_first"
    scales: tuple[float, ...] = (1, 1, 1, 1, 1)
    limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = True


def mamba2(p: Part, x: Array, s: Mamba2Shape) -> Array:
    batch, length, _ = x.shape
    GN = s.G * s.N
    widths = (s.E, s.E, GN, GN, s.H)
    factors = np.concatenate([np.full(n, f) for n, f in zip(widths, s.scales, strict=True)])
    projected = p("hook_in_proj", (x @ p["in_proj.weight"].T + p.bias("in_proj.bias")) * factors)
    z, xBC, dt = np.split(projected, [s.E, 2 * s.E + 2 * GN], -1)
    xBC, z = p("hook_x_pre", xBC), p("hook_z", z)
    xBC = silu(p("hook_conv", convolve(xBC, p["conv1d.weight"], p.bias("conv1d.bias"))))
    x, B, C = np.split(xBC, [s.E, s.E + GN], -1)
    x = p("hook_x", x.reshape(batch, length, s.H, -1))
    dt = p("hook_dt", softplus(p("hook_dt_pre", dt + p["dt_bias"])).clip(*s.limit))
    B, C = (p(f"hook_{n}", v.reshape(batch, length, s.G, s.N)) for n, v in (("B", B), ("C", C)))
    group = [h // (s.H // s.G) for h in range(s.H)]
    A_bar = p("hook_A_bar", np.exp(dt * -np.exp(p["A_log"])))
    B_bar = p("hook_B_bar", dt[..., None] * B[:, :, group])
    Bx = p("hook_Bx", x[..., None] * B_bar[:, :, :, None])
    h = p("hook_h", states(A_bar[..., None, None], Bx))
    y = p("hook_y_scan", (h * C[:, :, group][:, :, :, None]).sum(-1))
    y = p("hook_y", y + p("hook_skip", p["D"][:, None] * x)).reshape(batch, length, -1)
    gate = p("hook_gate", silu(z))
    if s.gated_norm == "gate_first":
        y = rms(p, "norm.", p["norm.weight"], p("hook_y_gated", y * gate), s.eps, s.G)
    else:
        if s.gated_norm == "norm_first":
            y = rms(p, "norm.", p["norm.weight"], y, s.eps, s.G)
        y = p("hook_y_gated", y * gate)
    return p("hook_out_proj", y @ p["out_proj.weight"].T + p.bias("out_proj.bias"))


def short_conv(p: Part, x: Array) -> Array:
    projected = p("hook_in_proj", x @ p["in_proj.weight"].T + p.bias("in_proj.bias"))
    B, C, x = (p(f"hook_{name}", v) for name, v in zip("BCx", np.split(projected, 3, -1), strict=True))
    y = p("hook_conv", convolve(p("hook_x_pre", B * x), p["conv.weight"], p.bias("conv.bias")))
    return p("hook_out_proj", p("hook_y_gated", C * y) @ p["out_proj.weight"].T + p.bias("out_proj.bias"))
