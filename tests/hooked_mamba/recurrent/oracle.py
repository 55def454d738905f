"""An independent forward pass of RWKV-7 and of gated DeltaNet in float64 numpy, one position after the other.

Peng et al. 2025 (arXiv:2503.14456, section 4) and Yang et al. 2024 (arXiv:2412.06464). Nothing of hooked_mamba is
used but a config's numbers; weights come as arrays under the names of the model's state dict. As in
tests.hooked_mamba.reference, every site is returned and may be edited, and complex arrays pass through, for exact
derivatives by the complex step.

`wrong` names details to get wrong, so that tests can show that each of them is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tests.hooked_mamba.recurrent import mamba3_oracle
from tests.hooked_mamba.reference import Edits, Recorder, silu, softplus

Array = np.ndarray
Memory = list[dict[str, Array]]
"""For each block its parts by name: "shift", "S", "ffn" (RWKV-7), "conv", "S" (gated DeltaNet)."""


@dataclass
class Pass:
    """What a pass leaves."""

    logits: Array
    sites: dict[str, Array]
    memory: Memory = field(default_factory=list)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def layer_norm(rec: Callable[[str, Array], Array], at: str, x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """With its three sites; over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    scale = rec(f"{at}.hook_scale", np.sqrt((x * x).mean(-1, keepdims=True) + eps))
    return rec(f"{at}.hook_out", rec(f"{at}.hook_normalized", x / scale) * weight + bias)


def rms_norm(rec: Callable[[str, Array], Array], at: str, x: Array, weight: Array, eps: float) -> Array:
    scale = rec(f"{at}.hook_scale", np.sqrt((x * x).mean(-1, keepdims=True) + eps))
    return rec(f"{at}.hook_out", rec(f"{at}.hook_normalized", x / scale) * weight)


def previous(x: Array, before: Array | None) -> Array:
    first = np.zeros_like(x[:, :1]) if before is None else before[:, None]
    return np.concatenate([first, x[:, :-1]], 1)


def delta_rule(
    rec: Recorder,
    at: str,
    S: Array,
    *,
    transition: Callable[[Array, int, Array | None], Array],
    write: Callable[[int, Array], Array],
    recall: Callable[[Array, int], Array],
    read: Callable[[Array, int], Array],
    length: int,
    delta: Callable[[int, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """(y, last S), position by position.

    transition(S, t, recalled)  what is left of the state, by the closed loop (recalled None) or for a given recall
    write(t, recalled), recall(S, t), read(S, t)
    delta(t, recalled)          gated DeltaNet's u; without it the write needs no recall
    """
    edited = [name for name in ("recall", "delta", "Bx") if f"{at}hook_{name}" in rec.edits]
    open_loop = bool(edited) if delta is not None else "recall" in edited
    found: dict[str, list[Array]] = {name: [] for name in ("recall", "delta", "Bx", "h", "y")}

    def steps(given: dict[str, Array], keep: bool) -> dict[str, list[Array]]:
        """One walk over the positions; `given` holds whole sequences that hooks returned."""
        state, out = S, {name: [] for name in found}
        for t in range(length):
            recalled = given["recall"][:, t] if "recall" in given else recall(state, t)
            out["recall"].append(recalled)
            if delta is not None:
                out["delta"].append(given["delta"][:, t] if "delta" in given else delta(t, recalled))
            value = out["delta"][-1] if delta is not None else recalled
            written = given["Bx"][:, t] if "Bx" in given else write(t, value)
            out["Bx"].append(written)
            state = transition(state, t, recalled if open_loop and keep else None) + written
            if keep:
                state = rec(f"{at}hook_h.{t}", state)
            out["h"].append(state)
        return out

    given: dict[str, Array] = {}
    if open_loop:
        plain = steps({}, keep=False)
        given["recall"] = rec(f"{at}hook_recall", np.stack(plain["recall"], 1))
        if delta is not None:
            given["delta"] = rec(
                f"{at}hook_delta", np.stack([delta(t, given["recall"][:, t]) for t in range(length)], 1)
            )
            writes = [write(t, given["delta"][:, t]) for t in range(length)]
        else:
            writes = [write(t, given["recall"][:, t]) for t in range(length)]
        given["Bx"] = rec(f"{at}hook_Bx", np.stack(writes, 1))
    elif edited:
        given["Bx"] = rec(f"{at}hook_Bx", np.stack([write(t, None) for t in range(length)], 1))
    out = steps(given, keep=True)
    if not open_loop:
        rec(f"{at}hook_recall", np.stack(out["recall"], 1))
        if delta is not None:
            rec(f"{at}hook_delta", np.stack(out["delta"], 1))
        if not edited:
            rec(f"{at}hook_Bx", np.stack(out["Bx"], 1))
    states = rec(f"{at}hook_h", np.stack(out["h"], 1))
    return np.stack([read(states[:, t], t) for t in range(length)], 1), out["h"][-1]


# RWKV-7 --------------------------------------------------------------------------------------------------------


def rwkv7(
    cfg,
    weights: Mapping[str, Array],
    tokens: Array,
    edits: Edits | None = None,
    memory: Memory | None = None,
    wrong: str = "",
) -> Pass:
    rec = Recorder(edits or {})
    after: Memory = [{} for _ in range(cfg.n_layers)]
    x = rec("hook_embed", weights["embed.weight"][rec("hook_tokens", tokens)])
    if wrong != "no ln_embed":
        x = layer_norm(rec, "ln_embed", x, weights["ln_embed.weight"], weights["ln_embed.bias"], cfg.eps)
    v_first: Array | None = None
    for i in range(cfg.n_layers):
        at, before = f"blocks.{i}.", {} if memory is None else memory[i]
        p = {name.removeprefix(at): value for name, value in weights.items() if name.startswith(at)}
        x = rec(f"{at}hook_resid_pre", x)
        n = layer_norm(rec, f"{at}norm", x, p["norm.weight"], p["norm.bias"], cfg.eps)
        mixed, v_first = _time_mix(cfg, rec, i, p, n, v_first, before, after[i], wrong)
        x = rec(f"{at}hook_resid_mid", x + mixed)
        n = layer_norm(rec, f"{at}norm2", x, p["norm2.weight"], p["norm2.bias"], cfg.eps)
        after[i]["ffn"] = n[:, -1]
        m = f"{at}mlp."
        shift = rec(f"{m}hook_shift", previous(n, before.get("ffn")))
        x_k = rec(f"{m}hook_x_k", n + p["mlp.x_k"] * (shift - n))
        pre = rec(f"{m}hook_pre", x_k @ p["mlp.key.weight"].T)
        post = rec(f"{m}hook_post", np.where(pre.real > 0, pre, 0) ** 2)
        x = rec(f"{at}hook_resid_post", x + rec(f"{m}hook_out", post @ p["mlp.value.weight"].T))
    x = layer_norm(rec, "ln_final", x, weights["ln_final.weight"], weights["ln_final.bias"], cfg.eps)
    logits = rec("hook_logits", x @ weights["unembed.weight"].T)
    unused = set(rec.edits) - rec.used
    assert not unused, f"no such site: {unused}"
    return Pass(logits, rec.sites, after)


def _time_mix(cfg, rec, layer, p, n, v_first, before, after, wrong):
    H, K = cfg.H, cfg.K
    at = f"blocks.{layer}.mixer."
    p = {name.removeprefix("mixer."): value for name, value in p.items() if name.startswith("mixer.")}
    batch, length, d = n.shape

    def heads(v: Array) -> Array:
        return v.reshape(*v.shape[:-1], H, K)

    after["shift"] = n[:, -1]
    dx = rec(f"{at}hook_shift", previous(n, before.get("shift"))) - n
    mu = {j: 1 - p[f"x_{j}"] if wrong == "mix turned round" else p[f"x_{j}"] for j in "rwkvag"}
    x = {j: rec(f"{at}hook_x_{j}", n + mu[j] * dx) for j in "rwkvag"}
    r = rec(f"{at}hook_r", heads(x["r"] @ p["receptance.weight"].T))
    k_pre = rec(f"{at}hook_k_pre", heads(x["k"] @ p["key.weight"].T))
    v = rec(f"{at}hook_v_pre", heads(x["v"] @ p["value.weight"].T))
    if layer == 0:
        v_first = rec(f"{at}hook_v_first", v)
    else:
        nu = rec(f"{at}hook_nu", sigmoid(heads(p["v0"] + x["v"] @ p["v1"] @ p["v2"])))
        v = v if wrong == "v_first dropped" else v + nu * (v_first - v)
    v = rec(f"{at}hook_v", v)
    low = rec(f"{at}hook_w_low", np.tanh(x["w"] @ p["w1"]))
    w_pre = rec(f"{at}hook_w_pre", heads(p["w0"] + low @ p["w2"]))
    w = rec(f"{at}hook_w", np.exp(-math.exp(-0.5) * sigmoid(w_pre)))
    a = rec(f"{at}hook_a", sigmoid(heads(p["a0"] + rec(f"{at}hook_a_low", x["a"] @ p["a1"]) @ p["a2"])))
    learned = k_pre * (1 + (a - 1) * heads(p["k_a"]))
    kappa = (learned if wrong == "kappa after k's update" else k_pre) * heads(p["k_k"])
    if wrong != "kappa unnormalised":
        kappa = kappa / np.sqrt((kappa * kappa).sum(-1, keepdims=True))
    kappa = rec(f"{at}hook_kappa", kappa)
    k = rec(f"{at}hook_k", learned)

    def transition(S: Array, t: int, recalled: Array | None) -> Array:
        decayed = S * w[:, t, :, None, :]
        under = decayed if wrong == "kappa on the decayed state" else S
        removed = np.einsum("bhvk,bhk->bhv", under, kappa[:, t]) if recalled is None else recalled
        return decayed - removed[..., None] * (a[:, t] * kappa[:, t])[:, :, None]

    S = before.get("S")
    y, after["S"] = delta_rule(
        rec,
        at,
        np.zeros((batch, H, K, K), n.dtype) if S is None else S,
        transition=transition,
        write=lambda t, _: v[:, t, :, :, None] * k[:, t, :, None, :],
        recall=lambda S, t: np.einsum("bhvk,bhk->bhv", S, kappa[:, t]),
        read=lambda S, t: np.einsum("bhvk,bhk->bhv", S, r[:, t]),
        length=length,
    )
    y = rec(f"{at}hook_y_scan", y)
    bonus = (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    if wrong == "bonus before the norm":
        y = y + bonus
    eps = 1e-5 if wrong == "eps of heads 1e-5" else 1e-5 * K
    y = layer_norm(rec, f"{at}norm", y, heads(p["norm.weight"]), heads(p["norm.bias"]), eps)
    bonus = rec(f"{at}hook_bonus", bonus)
    y = rec(f"{at}hook_y", y if wrong == "bonus before the norm" else y + bonus)
    gate = rec(f"{at}hook_gate", rec(f"{at}hook_g_low", sigmoid(x["g"] @ p["g1"])) @ p["g2"])
    gated = rec(f"{at}hook_y_gated", y.reshape(batch, length, d) * gate)
    return rec(f"{at}hook_out_proj", gated @ p["output.weight"].T), v_first


# Gated DeltaNet ------------------------------------------------------------------------------------------------


def deltanet(
    cfg,
    weights: Mapping[str, Array],
    tokens: Array,
    edits: Edits | None = None,
    memory: Memory | None = None,
    wrong: str = "",
) -> Pass:
    """A hybrid whose blocks are a mixer, gated DeltaNet or Mamba-3, and then a gated MLP, if anything."""
    rec, mix = Recorder(edits or {}), cfg.branches["mixer"]
    after: Memory = [{} for _ in range(cfg.n_layers)]
    x = rec("hook_embed", weights["embed.weight"][rec("hook_tokens", tokens)])
    for i in range(cfg.n_layers):
        at, before = f"blocks.{i}.", {} if memory is None else memory[i]
        p = {name.removeprefix(at): value for name, value in weights.items() if name.startswith(at)}
        x = rec(f"{at}hook_resid_pre", x)
        n = rms_norm(rec, f"{at}norm", x, p["norm.weight"], cfg.eps)
        x = x + rec(f"{at}hook_mixer_out", _mixer(mix, rec, i, p, n, before, after[i], wrong))
        if "norm2.weight" not in p:  # nothing but the mixer
            x = rec(f"{at}hook_resid_post", x)
            continue
        x = rec(f"{at}hook_resid_mid", x)
        n = rms_norm(rec, f"{at}norm2", x, p["norm2.weight"], cfg.eps)
        gate = rec(f"{at}mlp.hook_pre", n @ p["mlp.gate_proj.weight"].T)
        up = rec(f"{at}mlp.hook_pre_linear", n @ p["mlp.up_proj.weight"].T)
        post = rec(f"{at}mlp.hook_post", silu(gate) * up)
        out = rec(f"{at}mlp.hook_out", post @ p["mlp.down_proj.weight"].T)
        x = rec(f"{at}hook_resid_post", x + rec(f"{at}hook_mlp_out", out))
    x = rms_norm(rec, "ln_final", x, weights["ln_final.weight"], cfg.eps)
    logits = rec("hook_logits", x @ weights["unembed.weight"].T)
    unused = set(rec.edits) - rec.used
    assert not unused, f"no such site: {unused}"
    return Pass(logits, rec.sites, after)


def _mixer(cfg, rec, layer, p, n, before, after, wrong):
    if not hasattr(cfg, "A_act"):
        return _deltanet(cfg, rec, layer, p, n, before, after, wrong)
    p = {name.removeprefix("mixer."): value for name, value in p.items() if name.startswith("mixer.")}
    out, memory = mamba3_oracle.equations(cfg, lambda name, x: rec(f"blocks.{layer}.mixer.{name}", x), p, n, before)
    after |= memory
    return out


def _deltanet(cfg, rec, layer, p, n, before, after, wrong):
    at = f"blocks.{layer}.mixer."
    p = {name.removeprefix("mixer."): value for name, value in p.items() if name.startswith("mixer.")}
    G, H, K, V = cfg.n_key_heads, cfg.n_value_heads, cfg.key_dim, cfg.value_dim
    batch, length, _ = n.shape
    qkv = rec(f"{at}hook_x_pre", n @ p["in_proj.weight"].T)
    taps = cfg.d_conv
    after["conv"] = np.zeros((batch, 0, qkv.shape[2]))
    if taps:
        past = before.get("conv")
        past = np.zeros((batch, taps - 1, qkv.shape[2]), qkv.dtype) if past is None else past
        longer = np.concatenate([past, qkv], 1)
        after["conv"] = longer[:, length:]
        conv = sum(longer[:, j : j + length] * p["conv1d.weight"][:, 0, j] for j in range(taps))
        qkv = rec(f"{at}hook_conv", conv + p.get("conv1d.bias", 0))
    qkv = silu(qkv)
    q = rec(f"{at}hook_q_pre", qkv[..., : G * K].reshape(batch, length, G, K))
    k = rec(f"{at}hook_k_pre", qkv[..., G * K : 2 * G * K].reshape(batch, length, G, K))
    v = qkv[..., 2 * G * K :].reshape(batch, length, H, V)
    if wrong != "no lengths":
        q, k = (u / np.sqrt((u * u).sum(-1, keepdims=True) + 1e-6) for u in (q, k))
    q, k = rec(f"{at}hook_q", q * K**-0.5), rec(f"{at}hook_k", k)
    v = rec(f"{at}hook_v", v)
    dt = rec(f"{at}hook_dt", softplus(rec(f"{at}hook_dt_pre", n @ p["a_proj.weight"].T + p["dt_bias"])))
    A_bar = rec(f"{at}hook_A_bar", np.exp(-np.exp(p["A_log"]) * dt))
    beta = sigmoid(rec(f"{at}hook_beta_pre", n @ p["b_proj.weight"].T))
    beta = rec(f"{at}hook_beta", beta * 2 if cfg.negative_eigenvalues and wrong != "beta not doubled" else beta)
    of = [j % G for j in range(H)] if wrong == "heads tiled" else [j // (H // G) for j in range(H)]
    q, k = q[:, :, of], k[:, :, of]

    def recall(S: Array, t: int) -> Array:
        under = np.einsum("bhvk,bhk->bhv", S, k[:, t])
        return under if wrong == "removal of the undecayed state" else A_bar[:, t, :, None] * under

    y, after["S"] = delta_rule(
        rec,
        at,
        before["S"] if "S" in before else np.zeros((batch, H, V, K), n.dtype),
        transition=lambda S, t, _: A_bar[:, t, :, None, None] * S,
        write=lambda t, u: u[..., None] * k[:, t, :, None],
        recall=recall,
        read=lambda S, t: np.einsum("bhvk,bhk->bhv", S, q[:, t]),
        length=length,
        delta=lambda t, recalled: beta[:, t, :, None] * (v[:, t] - recalled),
    )
    y = rec(f"{at}hook_y_scan", y)
    gate = None
    if cfg.gate != "none":
        z = rec(f"{at}hook_z", (n @ p["z_proj.weight"].T).reshape(batch, length, H, V))
        gate = rec(f"{at}hook_gate", silu(z) if cfg.gate == "silu" else sigmoid(z))
    if wrong == "norm after the gate":
        y = y * gate
    weight = 1 + p["norm.weight"] if wrong == "norm 1 + w" else p["norm.weight"]
    y = rms_norm(rec, f"{at}norm", y, weight, cfg.norm_eps)
    y = rec(f"{at}hook_y_gated", y * gate if gate is not None and wrong != "norm after the gate" else y)
    return rec(f"{at}hook_out_proj", y.reshape(batch, length, H * V) @ p["out_proj.weight"].T)
