"""Attention, with positions or without."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from tests.hooked_mamba.hybrids.reference.parts import Array, Part, softmax


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
