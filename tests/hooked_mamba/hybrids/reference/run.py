"""What the families share: embedding, logits, and what configs say alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.hooked_mamba.hybrids.reference.attention import AttentionShape
from tests.hooked_mamba.hybrids.reference.mixers import Mamba2Shape
from tests.hooked_mamba.hybrids.reference.parts import Array, Part, Sites, rms


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
