"""MLPs and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.hooked_mamba.hybrids.reference.parts import Array, Part, relu2, sigmoid, silu, softmax


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
