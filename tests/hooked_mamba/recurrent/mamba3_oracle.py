"""An independent Mamba-3 mixer (arXiv:2603.15569, single input and output) in float64 numpy, position by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tests.hooked_mamba.reference import Edits, Recorder, silu, softplus

Array = np.ndarray


def heavy_tail(x: Array) -> Array:
    return np.where(x.real > 0, 1 + x, 1 / (1 - np.where(x.real > 0, 0, x)))


def mixer(
    cfg, p: Mapping[str, Array], n: Array, edits: Edits | None = None, memory: dict[str, Array] | None = None
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """(output, sites by their own names, memory)."""
    rec = Recorder(edits or {})
    E, H, P, N, S, G = cfg.E, cfg.H, cfg.head_dim, cfg.d_state, cfg.S, cfg.n_groups
    batch, length, _ = n.shape
    whole = rec("hook_in_proj", n @ p["in_proj.weight"].T + p.get("in_proj.bias", 0))
    z, x, B, C, dt, A, lam, angle = np.split(whole, np.cumsum([E, E, G * N, G * N, H, H, H]), -1)
    z, x = rec("hook_z", z), rec("hook_x", x.reshape(batch, length, H, P))
    dt = rec("hook_dt", softplus(rec("hook_dt_pre", dt + p["dt_bias"])))
    f: Callable[[Array], Array] = softplus if cfg.A_act == "softplus" else heavy_tail
    rate = f(A)
    A = rec("hook_A", -np.where(rate.real < cfg.A_floor, cfg.A_floor, rate))
    lam = rec("hook_lam", 1 / (1 + np.exp(-lam)))

    def heads(v: Array, which: str) -> Array:
        v = v.reshape(batch, length, G, N)
        v = v / np.sqrt((v * v).mean(-1, keepdims=True) + cfg.norm_eps) * p[f"{which}_norm_weight"]
        return np.repeat(v, H // G, 2) + p[f"{which}_bias"]

    memory = memory or {}
    theta = memory.get("theta", np.zeros((batch, H, S)))
    thetas = []
    for t in range(length):
        theta = theta + np.pi * np.tanh(angle[:, t, None]) * dt[:, t, :, None]
        thetas.append(theta)
    thetas = rec("hook_angle", np.stack(thetas, 1))
    B, C = rec("hook_B_pre", heads(B, "B")), rec("hook_C_pre", heads(C, "C"))

    def turned(v: Array) -> Array:
        v = v.astype(np.result_type(v, thetas)).copy()
        for i in range(S):
            a, b, angle = v[..., 2 * i].copy(), v[..., 2 * i + 1].copy(), thetas[..., i]
            v[..., 2 * i] = a * np.cos(angle) - b * np.sin(angle)
            v[..., 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return v

    B, C = rec("hook_B", turned(B)), rec("hook_C", turned(C))
    A_bar = rec("hook_A_bar", np.exp(A * dt))
    beta, gamma = rec("hook_beta", (1 - lam) * dt * A_bar), rec("hook_gamma", lam * dt)
    x_before = np.concatenate([memory.get("x", np.zeros((batch, H, P)))[:, None], x[:, :-1]], 1)
    B_before = np.concatenate([memory.get("B", np.zeros((batch, H, N)))[:, None], B[:, :-1]], 1)
    old = rec("hook_Bx_prev", np.einsum("blh,blhp,blhn->blhpn", beta, x_before, B_before))
    new = rec("hook_Bx", np.einsum("blh,blhp,blhn->blhpn", gamma, x, B))
    h, hs = memory.get("ssm", np.zeros((batch, H, P, N))), []
    for t in range(length):
        h = rec(f"hook_h.{t}", A_bar[:, t, :, None, None] * h + old[:, t] + new[:, t])
        hs.append(h)
    states = rec("hook_h", np.stack(hs, 1))
    y = rec("hook_y_scan", np.einsum("blhpn,blhn->blhp", states, C))
    y = rec("hook_y", y + rec("hook_skip", p["D"][:, None] * x))
    if cfg.norm_of_heads:
        scale = rec("norm.hook_scale", np.sqrt((y * y).mean(-1, keepdims=True) + cfg.norm_eps))
        normalized = rec("norm.hook_normalized", (y / scale).reshape(batch, length, E))
        y = rec("norm.hook_out", normalized * p["norm.weight"])
    gated = rec("hook_y_gated", y.reshape(batch, length, E) * rec("hook_gate", silu(z)))
    out = rec("hook_out_proj", gated @ p["out_proj.weight"].T + p.get("out_proj.bias", 0))
    unused = set(rec.edits) - rec.used
    assert not unused, f"no such site: {unused}"
    return out, rec.sites, {"theta": theta, "ssm": h, "B": B[:, -1], "x": x[:, -1]}
