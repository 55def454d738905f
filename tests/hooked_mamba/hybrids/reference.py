"""The hybrids' equations in float64, as plain loops over the tensors of transformers' files; imports nothing of ours.

`forward(config, weights, tokens)` gives the logits and the value at every site; `edits` maps a site to a function of
its value, whose result the rest of the computation uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Array = np.ndarray
Edits = Mapping[str, Callable[[Array], Array]]


@dataclass
class Sites:
    """What stands at each site, edits applied."""

    edits: Edits
    values: dict[str, Array] = field(default_factory=dict)
    logits: Array | None = None

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.edits:
            value = self.edits[name](value)
        self.values[name] = value
        return value


class Part:
    """The sites under a prefix of ours and the weights under a prefix of theirs."""

    def __init__(self, sites: Sites, ours: str, weights: Mapping[str, Array], theirs: str) -> None:
        self.sites, self.ours, self.weights, self.theirs = sites, ours, weights, theirs

    def __call__(self, site: str, value: Array) -> Array:
        return self.sites(f"{self.ours}{site}", value)

    def __getitem__(self, name: str) -> Array:
        return self.weights[f"{self.theirs}{name}"]

    def bias(self, name: str) -> Array | float:
        return self.weights.get(f"{self.theirs}{name}", 0.0)

    def at(self, ours: str, theirs: str) -> Part:
        return Part(self.sites, f"{self.ours}{ours}", self.weights, f"{self.theirs}{theirs}")


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def relu2(x: Array) -> Array:
    return np.maximum(x, 0) ** 2


ACTIVATIONS = {"silu": silu, "gelu": gelu, "relu2": relu2}


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(part: Part, ours: str, weight: Array, x: Array, eps: float, groups: int | None = None) -> Array:
    """x / sqrt(mean x^2 + eps) * weight, over each of `groups` equal parts where they are given."""
    parts = np.split(x, groups or 1, -1)
    scales = [np.sqrt((v**2).mean(-1, keepdims=True) + eps) for v in parts]
    scale = part(f"{ours}hook_scale", scales[0] if groups is None else np.stack(scales, -2))
    each = [scale] if groups is None else [scale[..., i, :] for i in range(groups)]
    quotient = np.concatenate([v / divisor for v, divisor in zip(parts, each, strict=True)], -1)
    return part(f"{ours}hook_out", part(f"{ours}hook_normalized", quotient) * weight)


def convolve(x: Array, weight: Array, bias: Array | float) -> Array:
    """Causal, one filter a channel: x b l c, weight c 1 K."""
    taps = weight.shape[-1]
    out = np.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(taps):
            source = t - (taps - 1) + k
            if source >= 0:
                out[:, t] += x[:, source] * weight[:, 0, k]
    return out + bias


# Mixers --------------------------------------------------------------------------------------------------------------


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


# Attention, MLP, experts ---------------------------------------------------------------------------------------------


def rotate(x: Array, width: int, base: float) -> Array:
    """Half-split RoPE of the first `width` numbers; frequencies are float32 in the published codes."""
    inv_freq = (1.0 / base ** (torch.arange(0, width, 2).float() / width)).double().numpy()
    out = x.copy()
    half = width // 2
    for t in range(x.shape[1]):
        for i in range(half):
            a, b, angle = x[:, t, :, i], x[:, t, :, i + half], t * inv_freq[i]
            out[:, t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@dataclass
class AttentionShape:
    heads: int
    kv: int
    c: int
    scale: float
    rotary: int = 0
    base: float = 10000.0
    key: float = 1.0
    qk_norm: float | None = None


def attention(p: Part, x: Array, s: AttentionShape, out: str = "o_proj") -> Array:
    batch, length, _ = x.shape
    q, k, v = (
        (x @ p[f"{n}_proj.weight"].T + p.bias(f"{n}_proj.bias")).reshape(batch, length, heads, s.c)
        for n, heads in (("q", s.heads), ("k", s.kv), ("v", s.kv))
    )
    if s.qk_norm is not None:
        q, k = (
            (pre := p(f"hook_{n}_pre", value)) / np.sqrt((pre**2).mean(-1, keepdims=True) + s.qk_norm) * p[weight]
            for n, value, weight in (("q", q, "q_layernorm.weight"), ("k", k, "k_layernorm.weight"))
        )
    q, k, v = p("hook_q", q), p("hook_k", k * s.key), p("hook_v", v)
    if s.rotary:
        q, k = p("hook_rot_q", rotate(q, s.rotary, s.base)), p("hook_rot_k", rotate(k, s.rotary, s.base))
    scores = np.full((batch, s.heads, length, length), -np.inf)
    for h in range(s.heads):
        j = h // (s.heads // s.kv)
        for t in range(length):
            for m in range(t + 1):
                scores[:, h, t, m] = (q[:, t, h] * k[:, m, j]).sum(-1) * s.scale
    pattern = p("hook_pattern", softmax(p("hook_attn_scores", scores)))
    z = np.zeros((batch, length, s.heads, s.c))
    for h in range(s.heads):
        j = h // (s.heads // s.kv)
        for t in range(length):
            z[:, t, h] = (pattern[:, h, t, :, None] * v[:, :, j]).sum(1)
    z = p("hook_z", z)
    W = p[f"{out}.weight"]
    per_head = [z[:, :, h] @ W[:, h * s.c : (h + 1) * s.c].T for h in range(s.heads)]
    result = p("hook_result", np.stack(per_head, 2))
    return p("hook_out", result.sum(2) + p.bias(f"{out}.bias"))


def gated_mlp(p: Part, x: Array, gate: Array, up: Array, down: Array, act: Callable = silu, m: float = 1.0) -> Array:
    pre, linear = p("hook_pre", x @ gate.T * m), p("hook_pre_linear", x @ up.T)
    return p("hook_out", p("hook_post", act(pre) * linear) @ down.T)


def plain_mlp(p: Part, x: Array, act: Callable) -> Array:
    post = p("hook_post", act(p("hook_pre", x @ p["up_proj.weight"].T)))
    return p("hook_out", post @ p["down_proj.weight"].T)


def best(scores: Array, k: int) -> list[int]:
    """The k best, best first, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


@dataclass
class Experts:
    """Matrices of each expert; `gate` is None where they are not gated."""

    gate: list[Array] | None
    up: list[Array]
    down: list[Array]
    act: Callable = silu


def experts(p: Part, x: Array, indices: Array, weights: Array, e: Experts) -> Array:
    """The weighted sum over each token's chosen experts."""
    batch, length, k = indices.shape

    def each(values: Array, matrices: list[Array]) -> Array:
        out = np.zeros((batch, length, k, matrices[0].shape[0]))
        for i in range(batch):
            for t in range(length):
                for j in range(k):
                    value = values[i, t] if values.ndim == 3 else values[i, t, j]
                    out[i, t, j] = matrices[indices[i, t, j]] @ value
        return out

    if e.gate is not None:
        post = e.act(p("hook_expert_pre", each(x, e.gate))) * p("hook_expert_pre_linear", each(x, e.up))
    else:
        post = e.act(p("hook_expert_pre", each(x, e.up)))
    out = p("hook_expert_out", each(p("hook_expert_post", post), e.down))
    return (out * weights[..., None]).sum(2)


def routed(p: Part, scores: Array, k: int) -> Array:
    rows = [[best(scores[i, t], k) for t in range(scores.shape[1])] for i in range(len(scores))]
    return p("hook_expert_indices", np.array(rows))


def pick(values: Array, indices: Array) -> Array:
    return np.take_along_axis(values, indices, -1)


def jamba_moe(p: Part, x: Array, X: int, k: int) -> Array:
    scores = p("hook_router_scores", softmax(p("hook_router_logits", x @ p["router.weight"].T)))
    indices = routed(p, scores, k)
    weights = p("hook_expert_weights", pick(scores, indices))
    matrices = ([p[f"experts.{e}.{n}_proj.weight"] for e in range(X)] for n in ("gate", "up", "down"))
    return p("hook_out", experts(p, x, indices, weights, Experts(*matrices)))


def granite_moe(p: Part, x: Array, k: int) -> Array:
    scores = p("hook_router_scores", p("hook_router_logits", x @ p["router.layer.weight"].T))
    indices = routed(p, scores, k)
    weights = p("hook_expert_weights", softmax(pick(scores, indices)))
    fused, down = p["input_linear.weight"], p["output_linear.weight"]
    F = fused.shape[1] // 2
    each = Experts([w[:F] for w in fused], [w[F:] for w in fused], list(down))
    return p("hook_out", experts(p, x, indices, weights, each))


def nemotron_moe(p: Part, x: Array, c: Mapping[str, Any]) -> Array:
    X, k = c["n_routed_experts"], c["num_experts_per_tok"]
    logits = p("hook_router_logits", x @ p["gate.weight"].T)
    scores = p("hook_router_scores", sigmoid(logits) + p["gate.e_score_correction_bias"])
    ranked = scores.copy()
    size = X // c["n_group"]
    for row in ranked.reshape(-1, X):  # views: only the best groups take part
        worth = np.array([np.sort(row[g * size : (g + 1) * size])[-2:].sum() for g in range(c["n_group"])])
        for g in set(range(c["n_group"])) - set(best(worth, c["topk_group"])):
            row[g * size : (g + 1) * size] = -np.inf
    indices = routed(p, ranked, k)
    weights = pick(sigmoid(logits), indices)
    if c["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdims=True)
    weights = p("hook_expert_weights", weights * c["routed_scaling_factor"])
    latent = p("hook_latent", x @ p["fc1_latent_proj.weight"].T)
    up, down = ([p[f"experts.{e}.{n}_proj.weight"] for e in range(X)] for n in ("up", "down"))
    out = experts(p, latent, indices, weights, Experts(None, up, down, relu2))
    return p("hook_out", out @ p["fc2_latent_proj.weight"].T)


# Families ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the families share: sites, weights, config."""

    sites: Sites
    weights: Mapping[str, Array]
    config: Mapping[str, Any]

    def block(self, i: int, theirs: str) -> Part:
        return Part(self.sites, f"blocks.{i}.", self.weights, theirs)

    def embed(self, tokens: Array, name: str, factor: float = 1.0) -> Array:
        return self.sites("hook_embed", self.weights[name][self.sites("hook_tokens", tokens)] * factor)

    def unembed(self, x: Array, norm: str, eps: float, head: str, factor: float = 1.0) -> None:
        x = rms(Part(self.sites, "ln_final.", self.weights, ""), "", self.weights[norm], x, eps)
        self.sites.logits = self.sites("hook_logits", x @ self.weights[head].T * factor)


def theta(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    return rope.get("rope_theta", config.get("rope_theta", 10000.0))


def limit(config: Mapping[str, Any]) -> tuple[float, float]:
    low, high = config.get("time_step_limit") or (0.0, math.inf)
    return float(low), math.inf if isinstance(high, dict) else float(high)


def plain_attention(c: Mapping[str, Any], **more: Any) -> AttentionShape:
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    fields = {"heads": c["num_attention_heads"], "kv": c["num_key_value_heads"], "c": width, "scale": width**-0.5}
    return AttentionShape(**(fields | more))


def mamba_shape(c: Mapping[str, Any], E: int, **more: Any) -> Mamba2Shape:
    fields = {"E": E, "H": c["mamba_n_heads"], "G": c["mamba_n_groups"], "N": c["mamba_d_state"]}
    return Mamba2Shape(**(fields | {"eps": c["rms_norm_eps"], "limit": limit(c)} | more))


def jamba(run: Run, tokens: Array) -> None:
    c = run.config
    eps, x = c["rms_norm_eps"], run.embed(tokens, "model.embed_tokens.weight")
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        if i % c["attn_layer_period"] == c["attn_layer_offset"]:
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, plain_attention(c)))
        else:
            x = x + b("hook_mixer_out", mamba1(b.at("mixer.", "mamba."), n, c["mamba_d_state"], eps))
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["pre_ff_layernorm.weight"], x, eps)
        if i % c["expert_layer_period"] == c["expert_layer_offset"]:
            p = b.at("moe.", "feed_forward.")
            x = x + b("hook_moe_out", jamba_moe(p, n, c["num_experts"], c["num_experts_per_tok"]))
        else:
            p = b.at("mlp.", "feed_forward.")
            matrices = (p[f"{m}_proj.weight"] for m in ("gate", "up", "down"))
            x = x + b("hook_mlp_out", gated_mlp(p, n, *matrices))
        x = b("hook_resid_post", x)
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight")


def bamba(run: Run, tokens: Array) -> None:
    c = run.config
    eps, x = c["rms_norm_eps"], run.embed(tokens, "model.embed_tokens.weight")
    half = c["hidden_size"] // c["num_attention_heads"] // 2
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        if i in (c.get("attn_layer_indices") or [j for j, w in enumerate(c["layer_types"]) if "att" in w]):
            shape = plain_attention(c, rotary=half, base=theta(c))
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, shape))
        else:
            shape = mamba_shape(c, c["mamba_expand"] * c["hidden_size"])
            x = x + b("hook_mixer_out", mamba2(b.at("mixer.", "mamba."), n, shape))
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["pre_ff_layernorm.weight"], x, eps)
        p = b.at("mlp.", "feed_forward.")
        x = x + b("hook_mlp_out", gated_mlp(p, n, *(p[f"{m}_proj.weight"] for m in ("gate", "up", "down"))))
        x = b("hook_resid_post", x)
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight")


def granitemoehybrid(run: Run, tokens: Array) -> None:
    c = run.config
    eps, r = c["rms_norm_eps"], c["residual_multiplier"]
    x = run.embed(tokens, "model.embed_tokens.weight", c["embedding_multiplier"])
    width = c["hidden_size"] // c["num_attention_heads"]
    rope = {"rotary": width, "base": theta(c)} if c["position_embedding_type"] == "rope" else {}
    for i, word in enumerate(c["layer_types"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        if word in ("attention", "full_attention"):
            shape = plain_attention(c, scale=c["attention_multiplier"], **rope)
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, shape) * r)
        else:
            shape = mamba_shape(c, c["mamba_expand"] * c["hidden_size"])
            x = x + b("hook_mixer_out", mamba2(b.at("mixer.", "mamba."), n, shape) * r)
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["post_attention_layernorm.weight"], x, eps)
        added = 0
        if c["num_local_experts"]:
            p = b.at("moe.", "block_sparse_moe.")
            added = b("hook_moe_out", granite_moe(p, n, c["num_experts_per_tok"]) * r)
        p = b.at("mlp.", "shared_mlp.")
        gate, up = np.split(p["input_linear.weight"], 2)
        x = x + added + b("hook_mlp_out", gated_mlp(p, n, gate, up, p["output_linear.weight"]) * r)
        x = b("hook_resid_post", x)
    run.unembed(x, "model.norm.weight", eps, "model.embed_tokens.weight", 1 / c["logits_scaling"])


def nemotron_h(run: Run, tokens: Array) -> None:
    c = run.config
    eps = c["layer_norm_epsilon"]
    stem = "model." if "model.embeddings.weight" in run.weights else "backbone."
    x = run.embed(tokens, f"{stem}embeddings.weight")
    E = c["mamba_num_heads"] * c["mamba_head_dim"]
    shape = Mamba2Shape(E, c["mamba_num_heads"], c["n_groups"], c["ssm_state_size"], eps, limit=limit(c))
    for i, word in enumerate(c.get("layers_block_type") or c["layer_types"]):
        b = run.block(i, f"{stem}layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["norm.weight"], x, eps)
        if "mamba" in word or "linear" in word:
            x = x + b("hook_mixer_out", mamba2(b.at("mixer.", "mixer."), n, shape))
        elif "attention" in word:
            x = x + b("hook_attn_out", attention(b.at("attn.", "mixer."), n, plain_attention(c)))
        elif word == "mlp":
            x = x + b("hook_mlp_out", plain_mlp(b.at("mlp.", "mixer."), n, relu2))
        else:
            routed_out = b("hook_moe_out", nemotron_moe(b.at("moe.", "mixer."), n, c))
            x = x + routed_out + b("hook_mlp_out", plain_mlp(b.at("mlp.", "mixer.shared_experts."), n, relu2))
        x = b("hook_resid_post", x)
    run.unembed(x, f"{stem}norm_f.weight", eps, "lm_head.weight")


def falcon_h1(run: Run, tokens: Array) -> None:
    c = run.config
    eps = c["rms_norm_eps"]
    x = run.embed(tokens, "model.embed_tokens.weight", c["embedding_multiplier"])
    norm = "none" if not c["mamba_rms_norm"] else "norm_first" if c["mamba_norm_before_gate"] else "gate_first"
    shape = mamba_shape(c, c["mamba_d_ssm"], gated_norm=norm, scales=tuple(c["ssm_multipliers"]))
    heads = plain_attention(c, rotary=c["head_dim"], base=theta(c), key=c["key_multiplier"])
    m0, m1 = c["mlp_multipliers"]
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["input_layernorm.weight"], x, eps)
        mixed = mamba2(b.at("mixer.", "mamba."), n * c["ssm_in_multiplier"], shape) * c["ssm_out_multiplier"]
        looked = attention(b.at("attn.", "self_attn."), n * c["attention_in_multiplier"], heads)
        x = x + b("hook_mixer_out", mixed) + b("hook_attn_out", looked * c["attention_out_multiplier"])
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["pre_ff_layernorm.weight"], x, eps)
        p = b.at("mlp.", "feed_forward.")
        matrices = (p[f"{m}_proj.weight"] for m in ("gate", "up", "down"))
        x = x + b("hook_mlp_out", gated_mlp(p, n, *matrices, m=m0) * m1)
        x = b("hook_resid_post", x)
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight", c["lm_head_multiplier"])


def lfm2(run: Run, tokens: Array) -> None:
    c = run.config
    eps, x = c["norm_eps"], run.embed(tokens, "model.embed_tokens.weight")
    heads = plain_attention(c, base=theta(c), qk_norm=eps)
    heads.rotary = heads.c
    for i, word in enumerate(c["layer_types"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        n = rms(b, "norm.", b["operator_norm.weight"], x, eps)
        if word == "conv":
            x = x + b("hook_mixer_out", short_conv(b.at("mixer.", "conv."), n))
        else:
            x = x + b("hook_attn_out", attention(b.at("attn.", "self_attn."), n, heads, "out_proj"))
        x = b("hook_resid_mid", x)
        n = rms(b, "norm2.", b["ffn_norm.weight"], x, eps)
        p = b.at("mlp.", "feed_forward.")
        x = x + b("hook_mlp_out", gated_mlp(p, n, *(p[f"{m}.weight"] for m in ("w1", "w3", "w2"))))
        x = b("hook_resid_post", x)
    run.unembed(x, "model.embedding_norm.weight", eps, "lm_head.weight")


def zamba(run: Run, tokens: Array) -> None:
    c = run.config
    second = c["model_type"] == "zamba2"
    d, eps = c["hidden_size"], c["rms_norm_eps"]
    embedded = x = run.embed(tokens, "model.embed_tokens.weight")
    width = 2 * d // c["num_attention_heads"]
    heads = AttentionShape(c["num_attention_heads"], c["num_key_value_heads"], width, (width / 2) ** -0.5)
    if second and c["use_mem_rope"]:
        heads.rotary, heads.base = width, theta(c)
    E = c["mamba_expand"] * d
    groups = c.get("mamba_ngroups", 0)
    shape = Mamba2Shape(E, c["n_mamba_heads"], groups, c["mamba_d_state"], 1e-5, limit=limit(c))
    hybrid = [i for i, word in enumerate(c["layers_block_type"]) if word == "hybrid"]
    for i in range(c["num_hidden_layers"]):
        b = run.block(i, f"model.layers.{i}.")
        x = b("hook_resid_pre", x)
        entering, m = x, b
        if i in hybrid:
            j = hybrid.index(i)
            first = hybrid[j % (c["num_mem_blocks"] if second else 1)]
            name = "shared_transformer" if second else "shared_transf"
            shared = run.block(i, f"model.layers.{first}.{name}.")
            n = rms(shared, "norm_shared.", shared["input_layernorm.weight"], np.concatenate([x, embedded], -1), eps)
            looked = attention(Adapted(shared.at("attn.", "self_attn."), j if second else None), n, heads)
            n = rms(shared, "norm2.", shared["pre_ff_layernorm.weight"], looked, eps)
            p = shared.at("mlp.", "feed_forward.")
            if second:
                list_of = f"gate_up_proj_adapter_list.{j}."
                low = p[f"{list_of}1.weight"] @ p[f"{list_of}0.weight"]
                gate, up = np.split(p["gate_up_proj.weight"] + low, 2)
            else:
                gate, up = p["gate_proj.weight"], p["up_proj.weight"]
            made = gated_mlp(p, n, gate, up, p["down_proj.weight"], gelu)
            entering = b("hook_mixer_in", x + b("hook_shared_out", made @ b["linear.weight"].T))
            m = run.block(i, f"model.layers.{i}.mamba_decoder.")
        n = rms(m, "norm.", m["input_layernorm.weight"], entering, eps)
        p = m.at("mixer.", "mamba.")
        mixed = mamba2(p, n, shape) if second else mamba1_heads(p, n, c["mamba_d_state"])
        x = b("hook_resid_post", x + b("hook_mixer_out", mixed))
    run.unembed(x, "model.final_layernorm.weight", eps, "lm_head.weight")


class Adapted(Part):
    """Attention's weights with what its j-th use adds to them."""

    def __init__(self, part: Part, j: int | None) -> None:
        super().__init__(part.sites, part.ours, part.weights, part.theirs)
        self.j = j

    def __getitem__(self, name: str) -> Array:
        weight, letter = super().__getitem__(name), name[0]
        if self.j is None or letter == "o":
            return weight
        low = [super(Adapted, self).__getitem__(f"linear_{letter}_adapter_list.{self.j}.{k}.weight") for k in (0, 1)]
        return weight + low[1] @ low[0]


FAMILIES = {f.__name__: f for f in (jamba, bamba, granitemoehybrid, nemotron_h, falcon_h1, lfm2, zamba)}
FAMILIES["zamba2"] = zamba


def forward(
    config: Mapping[str, Any], weights: Mapping[str, Array], tokens: Array, edits: Edits | None = None
) -> Sites:
    """Logits and sites."""
    sites = Sites(edits or {})
    head = {} if "lm_head.weight" in weights else {"lm_head.weight": weights.get("model.embed_tokens.weight")}
    FAMILIES[config["model_type"]](Run(sites, {**weights, **head}, config), tokens)
    return sites
