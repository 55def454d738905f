"""An independent Mamba-3 mixer (arXiv:2603.15569) in float64 numpy, position by position and rank by rank."""

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
    out, after = equations(cfg, rec, p, n, memory or {})
    unused = set(rec.edits) - rec.used
    assert not unused, f"no such site: {unused}"
    return out, rec.sites, after


def equations(cfg, rec: Callable[[str, Array], Array], p: Mapping[str, Array], n: Array, memory: Mapping[str, Array]):
    """(output, memory); with mimo_rank there is an axis of ranks in front of the heads."""
    R = getattr(cfg, "mimo_rank", None)
    E, H, P, N, S, G = cfg.E, cfg.H, cfg.head_dim, cfg.d_state, cfg.S, cfg.n_groups
    ranks, wide = R or 1, (R or 1) * G * N
    batch, length, _ = n.shape
    whole = rec("hook_in_proj", n @ p["in_proj.weight"].T + p.get("in_proj.bias", 0))
    z, x, B, C, dt, A, lam, angle = np.split(whole, np.cumsum([E, E, wide, wide, H, H, H]), -1)
    z, x = rec("hook_z", z), rec("hook_x", x.reshape(batch, length, H, P))
    dt = rec("hook_dt", softplus(rec("hook_dt_pre", dt + p["dt_bias"])))
    f: Callable[[Array], Array] = softplus if cfg.A_act == "softplus" else heavy_tail
    rate = f(A)
    A = rec("hook_A", -np.where(rate.real < cfg.A_floor, cfg.A_floor, rate))
    lam = rec("hook_lam", 1 / (1 + np.exp(-lam)))

    def heads(v: Array, which: str) -> Array:
        """b l r h n, or b l h n of one rank."""
        v = v.reshape(batch, length, ranks, G, N)
        v = v / np.sqrt((v * v).mean(-1, keepdims=True) + cfg.norm_eps) * p[f"{which}_norm_weight"]
        v = np.repeat(v, H // G, 3)
        return v + np.swapaxes(p[f"{which}_bias"], 0, 1) if R else v[:, :, 0] + p[f"{which}_bias"]

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
            one, other = (i, i + N // 2) if R else (2 * i, 2 * i + 1)
            angle = thetas[:, :, None, :, i] if R else thetas[..., i]
            a, b = v[..., one].copy(), v[..., other].copy()
            v[..., one] = a * np.cos(angle) - b * np.sin(angle)
            v[..., other] = a * np.sin(angle) + b * np.cos(angle)
        return v

    B, C = rec("hook_B", turned(B)), rec("hook_C", turned(C))
    up = np.swapaxes(p["mimo_x"], 0, 1) if R else None
    xs = rec("hook_x_rank", x[:, :, None] * up) if R else x
    A_bar = rec("hook_A_bar", np.exp(A * dt))
    beta, gamma = rec("hook_beta", (1 - lam) * dt * A_bar), rec("hook_gamma", lam * dt)
    zeros = np.zeros((batch, ranks, H, N)) if R else np.zeros((batch, H, N))
    x_last = memory.get("x", np.zeros((batch, H, P)))
    x_last = x_last[:, None] * up if R else x_last
    x_before = np.concatenate([x_last[:, None], xs[:, :-1]], 1)
    B_before = np.concatenate([memory.get("B", zeros)[:, None], B[:, :-1]], 1)
    rank = "r" if R else ""
    old = rec("hook_Bx_prev", np.einsum(f"blh,bl{rank}hp,bl{rank}hn->blhpn", beta, x_before, B_before))
    new = rec("hook_Bx", np.einsum(f"blh,bl{rank}hp,bl{rank}hn->blhpn", gamma, xs, B))
    h, hs = memory.get("ssm", np.zeros((batch, H, P, N))), []
    for t in range(length):
        h = rec(f"hook_h.{t}", A_bar[:, t, :, None, None] * h + old[:, t] + new[:, t])
        hs.append(h)
    states = rec("hook_h", np.stack(hs, 1))
    y = rec("hook_y_scan", np.einsum(f"blhpn,bl{rank}hn->bl{rank}hp", states, C))
    y = rec("hook_y", y + rec("hook_skip", p["D"][:, None] * xs))
    if cfg.norm_of_heads:
        scale = rec("norm.hook_scale", np.sqrt((y * y).mean(-1, keepdims=True) + cfg.norm_eps))
        normalized = rec("norm.hook_normalized", (y / scale).reshape(*y.shape[:-2], E))
        y = rec("norm.hook_out", normalized * p["norm.weight"])
    y = y.reshape(*y.shape[: 3 if R else 2], E)
    if R:
        z_up, down = (np.swapaxes(p[name], 0, 1).reshape(R, E) for name in ("mimo_z", "mimo_o"))
        gated = rec("hook_y_gated", y * rec("hook_gate", silu(z[:, :, None] * z_up)))
        y = rec("hook_y_merged", (gated * down).sum(2))
    else:
        y = rec("hook_y_gated", y * rec("hook_gate", silu(z)))
    out = rec("hook_out_proj", y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0))
    return out, {"theta": theta, "ssm": h, "B": B[:, -1], "x": x[:, -1]}
