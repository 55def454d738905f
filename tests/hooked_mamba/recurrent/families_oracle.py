"""Hybrids of gated DeltaNet (Qwen3-Next, Qwen3.5, OLMo Hybrid) in float64, as plain loops with every site.

The weights are those of our model; that they are read right from published files is tested against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.hooked_mamba.hybrids import reference
from tests.hooked_mamba.hybrids.reference import Array, Edits, Part, Sites, rms, rotate, sigmoid, silu, softmax
from tests.hooked_mamba.recurrent import oracle


def forward(cfg, weights: Mapping[str, Array], tokens: Array, edits: Edits | None = None) -> Sites:
    """Logits and sites."""
    sites = Sites(edits or {})
    top = Part(sites, "", weights, "")
    x = top("hook_embed", top["embed.weight"][top("hook_tokens", tokens)])
    for i, layout in enumerate(cfg.layout):
        b = Part(sites, f"blocks.{i}.", weights, f"blocks.{i}.")
        after = i in cfg.norm_after
        x = b("hook_resid_pre", x)
        for number, stage in enumerate(layout):
            norm = "norm." if number == 0 else f"norm{number + 1}."
            x = b("hook_resid_mid", x) if number else x
            n = x if after else rms(b, norm, b[f"{norm}weight"], x, cfg.eps)
            for entry in stage:
                name, _, shape = entry.partition("=")
                out = branch(name, cfg.branches[shape or name], b, i, n)
                out = rms(b, norm, b[f"{norm}weight"], out, cfg.eps) if after else out
                x = x + b(f"hook_{name}_out", out)
        x = b("hook_resid_post", x)
    x = rms(top, "ln_final.", top["ln_final.weight"], x, cfg.eps)
    sites.logits = top("hook_logits", x @ weights.get("unembed.weight", top["embed.weight"]).T)
    return sites


def branch(name: str, cfg, b: Part, layer: int, n: Array) -> Array:
    p = b.at(f"{name}.", f"{name}.")
    if name == "mixer":
        own = {k.removeprefix(f"blocks.{layer}."): v for k, v in b.weights.items() if k.startswith(f"blocks.{layer}.")}
        return oracle._deltanet(cfg, b.sites, layer, own, n, {}, {}, "")
    if name == "attn":
        return attention(p, cfg, n)
    return experts(p, cfg, n) if name == "moe" else mlp(p, cfg, n)


def attention(p: Part, cfg, x: Array) -> Array:
    """With a gate behind it, and norms of each head's queries and keys, or of all heads together."""
    batch, length, _ = x.shape
    Q, J, c = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head

    def heads(name: str, count: int) -> Array:
        return (x @ p[f"{name}_proj.weight"].T + p.bias(f"{name}_proj.bias")).reshape(batch, length, count, c)

    def normed(v: Array, weight: Array) -> Array:
        flat = v.reshape(batch, length, -1) if cfg.qk_norm_of_all else v
        return (flat / np.sqrt((flat**2).mean(-1, keepdims=True) + cfg.qk_norm_eps) * weight).reshape(v.shape)

    q, k, v = heads("q", Q), heads("k", J), heads("v", J)
    if cfg.qk_norm_eps is not None:
        q = normed(p("hook_q_pre", q), p["q_norm_weight"])
        k = normed(p("hook_k_pre", k), p["k_norm_weight"])
    q, k, v = p("hook_q", q), p("hook_k", k), p("hook_v", v)
    if cfg.rotary_dim:
        q = p("hook_rot_q", rotate(q, cfg.rotary_dim, cfg.rotary_base))
        k = p("hook_rot_k", rotate(k, cfg.rotary_dim, cfg.rotary_base))
    of = [h // (Q // J) for h in range(Q)]
    scores = np.full((batch, Q, length, length), -np.inf)
    for t in range(length):
        for m in range(t + 1):
            scores[:, :, t, m] = (q[:, t] * k[:, m, of]).sum(-1) * c**-0.5
    pattern = p("hook_pattern", softmax(p("hook_attn_scores", scores)))
    z = p("hook_z", np.einsum("bhtm,bmhc->bthc", pattern, v[:, :, of]))
    if cfg.output_gate:
        z = p("hook_z_gated", z * p("hook_gate", sigmoid(heads("gate", Q))))
    W = p["o_proj.weight"].reshape(-1, Q, c)
    result = p("hook_result", np.einsum("blhc,dhc->blhd", z, W))
    return p("hook_out", result.sum(2) + p.bias("o_proj.bias"))


def mlp(p: Part, cfg, x: Array) -> Array:
    pre, linear = p("hook_pre", x @ p["gate_proj.weight"].T), p("hook_pre_linear", x @ p["up_proj.weight"].T)
    out = p("hook_post", silu(pre) * linear) @ p["down_proj.weight"].T
    if cfg.output_gate:
        out = out * p("hook_gate", sigmoid(x @ p["output_gate.weight"].T))
    return p("hook_out", out)


def experts(p: Part, cfg, x: Array) -> Array:
    scores = p("hook_router_scores", softmax(p("hook_router_logits", x @ p["router.weight"].T)))
    indices = reference.routed(p, scores, cfg.top_k)
    weights = reference.pick(scores, indices)
    weights = weights / weights.sum(-1, keepdims=True) if cfg.normalize else weights
    each = reference.Experts(list(p["gate_proj"]), list(p["up_proj"]), list(p["down_proj"]))
    return p("hook_out", reference.experts(p, x, indices, p("hook_expert_weights", weights), each))
