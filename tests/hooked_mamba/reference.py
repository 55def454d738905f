"""An independent forward pass of both families, in float64 numpy, written from the papers' equations.

Gu & Dao 2023 (arXiv:2312.00752, algorithm 2), Dao & Gu 2024 (arXiv:2405.21060, section 7), Falcon-Mamba
(arXiv:2410.05355). The recurrence and the convolution are loops over positions. Nothing of hooked_mamba is used but
the config's numbers; weights come as numpy arrays under the names of the model's state dict.

Every named site is returned, and may be edited where it is computed. Complex arrays pass through: a value
v + 1e-20j d gives, in the imaginary part of all that follows, its exact derivative along d (the complex step;
Squire & Trapp 1998), so that gradients are checked to the last digits without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hooked_mamba.config import Mamba2Config, MambaConfig

Array = np.ndarray
Edits = Mapping[str, Callable[[Array], Array]]
"""Full site name -> what takes the site's value and returns the value that the rest of the computation uses."""

STEP = 1e-20
"""Size of an imaginary perturbation: too small for any real part to notice."""


@dataclass
class Pass:
    """What one forward pass leaves."""

    logits: Array
    """b l V"""
    sites: dict[str, Array]
    """Full name -> final value, in computing order; `...hook_h.{t}` for every t too."""
    conv: list[Array] = field(default_factory=list)
    """Per layer the last K-1 inputs of the convolution, b K-1 C."""
    ssm: list[Array] = field(default_factory=list)
    """Per layer the last state."""


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    """log(1 + e^x), without overflow, analytic in x."""
    positive = x.real > 0
    small = np.exp(np.where(positive, -x, x))
    return np.where(positive, x, 0) + (np.log1p(small) if np.isrealobj(x) else np.log(1 + small))


def clamp(x: Array, low: float, high: float) -> Array:
    return np.where(x.real < low, low, np.where(x.real > high, high, x))


class Recorder:
    """Gives each site's value to its edit, if it has one, and keeps what came of it."""

    def __init__(self, edits: Edits) -> None:
        self.edits, self.sites = dict(edits), {}
        self.used: set[str] = set()

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.edits:
            self.used.add(name)
            value = self.edits[name](value.copy())
        self.sites[name] = value
        return value


def forward(
    cfg: MambaConfig | Mamba2Config,
    weights: Mapping[str, Array],
    tokens: Array | None,
    edits: Edits | None = None,
    *,
    resid: Array | None = None,
    conv: Sequence[Array] | None = None,
    ssm: Sequence[Array] | None = None,
) -> Pass:
    """Run the model on tokens b l, or on embeddings `resid` b l d, from an optional memory.

    Parameters
    ----------
    cfg
        Sizes, eps, limits.
    weights
        State dict as arrays, float64 or complex.
    edits
        Functions at sites.
    conv, ssm
        Per layer the memory as a :class:`Pass` leaves it.
    """
    site = Recorder(edits or {})
    if tokens is not None:
        tokens = site("hook_tokens", tokens)
        resid = weights["embed.weight"][tokens]
    x = site("hook_embed", resid)
    mixer = mixer2 if isinstance(cfg, Mamba2Config) else mixer1
    result = Pass(x, site.sites)
    for i in range(cfg.n_layers):
        at, w = f"blocks.{i}.", weights_under(weights, f"blocks.{i}.")
        x = site(at + "hook_resid_pre", x)
        normed = norm(site, at + "norm.", x, w["norm.weight"], cfg.eps)
        memory = (None if conv is None else conv[i], None if ssm is None else ssm[i])
        out, last_inputs, h = mixer(cfg, weights_under(w, "mixer."), site, at + "mixer.", normed, *memory)
        result.conv.append(last_inputs)
        result.ssm.append(h)
        x = site(at + "hook_resid_post", x + out)
    x = norm(site, "ln_final.", x, weights["ln_final.weight"], cfg.eps)
    result.logits = site("hook_logits", x @ weights["unembed.weight"].T)
    unused = set(site.edits) - site.used
    assert not unused, f"edits at sites that were never computed: {unused}"
    return result


def weights_under(weights: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def norm(site: Recorder, at: str, x: Array, weight: Array, eps: float, groups: int | None = None) -> Array:
    """x / sqrt(mean x^2 + eps) * weight, the mean over all of the last axis or over each of its groups."""
    parts = x if groups is None else x.reshape(*x.shape[:-1], groups, -1)
    scale = site(at + "hook_scale", np.sqrt((parts * parts).mean(-1, keepdims=True) + eps))
    normalized = site(at + "hook_normalized", (parts / scale).reshape(x.shape))
    return site(at + "hook_out", normalized * weight)


def weightless_norm(x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def linear(x: Array, w: Mapping[str, Array], name: str) -> Array:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def convolve(x: Array, before: Array | None, w: Mapping[str, Array]) -> tuple[Array, Array]:
    """Causal depthwise convolution, position by position, and the last K-1 inputs."""
    taps = w["conv1d.weight"][:, 0]
    channels, K = taps.shape
    if before is None:
        before = np.zeros((x.shape[0], K - 1, channels))
    window, outs = list(before.swapaxes(0, 1)), []
    for t in range(x.shape[1]):
        window.append(x[:, t])
        out = sum(window[-1 - k] * taps[:, K - 1 - k] for k in range(K))
        outs.append(out + w["conv1d.bias"] if "conv1d.bias" in w else out)
    last = window[len(window) - (K - 1) :]
    empty = np.zeros((x.shape[0], 0, channels))
    return np.stack(outs, 1), np.stack(last, 1) if last else empty


def recur(site: Recorder, at: str, A_bar: Array, Bx: Array, h: Array) -> tuple[Array, Array]:
    """h_t = A_bar_t h_{t-1} + Bx_t. Returns the stacked states as read, and the last as carried."""
    length, states = Bx.shape[1], []
    for t in range(length):
        h = A_bar[:, t] * h + Bx[:, t]
        negative = f"{at}hook_h.{t - length}"
        if negative in site.edits:
            h = site(negative, h)
        h = site(f"{at}hook_h.{t}", h)
        states.append(h)
    return site(at + "hook_h", np.stack(states, 1)), h


def mixer1(cfg: MambaConfig, w: Mapping[str, Array], site: Recorder, at: str, u: Array, before, h):
    """Mamba-1: A is diagonal with N entries a channel; dt, B and C are read from x."""
    E, N, R = cfg.E, cfg.d_state, cfg.R
    xz = site(at + "hook_in_proj", linear(u, w, "in_proj"))
    x = site(at + "hook_x_pre", xz[..., :E])
    z = site(at + "hook_z", xz[..., E:])
    x, last_inputs = convolve(x, before, w)
    x = site(at + "hook_x", silu(site(at + "hook_conv", x)))

    low = site(at + "hook_x_proj", linear(x, w, "x_proj"))
    dt_low, B, C = low[..., :R], low[..., R : R + N], low[..., R + N :]
    if cfg.mixer_norms:
        dt_low, B, C = (weightless_norm(v, cfg.mixer_norm_eps) for v in (dt_low, B, C))
    dt_low = site(at + "hook_dt_low", dt_low)
    dt = site(at + "hook_dt", softplus(site(at + "hook_dt_pre", linear(dt_low, w, "dt_proj"))))
    B, C = site(at + "hook_B", B), site(at + "hook_C", C)

    A = -np.exp(w["A_log"])
    A_bar = site(at + "hook_A_bar", np.exp(dt[..., None] * A))
    B_bar = site(at + "hook_B_bar", dt[..., None] * B[:, :, None, :])
    Bx = site(at + "hook_Bx", B_bar * x[..., None])
    h = np.zeros((x.shape[0], E, N)) if h is None else h
    states, h = recur(site, at, A_bar, Bx, h)
    y = site(at + "hook_y_scan", np.einsum("blen,bln->ble", states, C))
    y = site(at + "hook_y", y + site(at + "hook_skip", w["D"] * x))
    y = site(at + "hook_y_gated", y * site(at + "hook_gate", silu(z)))
    return site(at + "hook_out_proj", linear(y, w, "out_proj")), last_inputs, h


def mixer2(cfg: Mamba2Config, w: Mapping[str, Array], site: Recorder, at: str, u: Array, before, h):
    """Mamba-2: one A a head; x, B and C pass the convolution together; a norm follows the gate."""
    E, N, H, G = cfg.E, cfg.d_state, cfg.H, cfg.G
    rows, length = u.shape[:2]
    zxBCdt = site(at + "hook_in_proj", linear(u, w, "in_proj"))
    z, xBC, dt = zxBCdt[..., :E], zxBCdt[..., E : 2 * E + 2 * G * N], zxBCdt[..., 2 * E + 2 * G * N :]
    xBC = site(at + "hook_x_pre", xBC)
    z = site(at + "hook_z", z)
    xBC, last_inputs = convolve(xBC, before, w)
    xBC = silu(site(at + "hook_conv", xBC))
    x = site(at + "hook_x", xBC[..., :E].reshape(rows, length, H, E // H))
    dt = site(at + "hook_dt_pre", dt + w["dt_bias"])
    dt = site(at + "hook_dt", clamp(softplus(dt), *cfg.dt_limit))
    B = site(at + "hook_B", xBC[..., E : E + G * N].reshape(rows, length, G, N))
    C = site(at + "hook_C", xBC[..., E + G * N :].reshape(rows, length, G, N))

    A = -np.exp(w["A_log"])
    A_bar = site(at + "hook_A_bar", np.exp(dt * A))
    group = np.arange(H) // (H // G)
    B_bar = site(at + "hook_B_bar", dt[..., None] * B[:, :, group])
    Bx = site(at + "hook_Bx", x[..., None] * B_bar[..., None, :])
    h = np.zeros((rows, H, E // H, N)) if h is None else h
    states, h = recur(site, at, A_bar[..., None, None], Bx, h)
    y = site(at + "hook_y_scan", np.einsum("blhpn,blhn->blhp", states, C[:, :, group]))
    y = site(at + "hook_y", y + site(at + "hook_skip", w["D"][:, None] * x))
    y = site(at + "hook_y_gated", y.reshape(rows, length, E) * site(at + "hook_gate", silu(z)))
    y = norm(site, at + "norm.", y, w["norm.weight"], cfg.norm_eps, cfg.norm_groups)
    return site(at + "hook_out_proj", linear(y, w, "out_proj")), last_inputs, h


def cross_entropy(logits: Array, tokens: Array) -> Array:
    """Mean nats per next token."""
    logits = logits[:, :-1] - logits[:, :-1].real.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean()


def derivative(value: Array) -> Array:
    """The derivative that a complex step left in a value."""
    return np.imag(value) / STEP
