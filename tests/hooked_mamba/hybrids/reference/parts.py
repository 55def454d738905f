"""Sites, weights by name, and the functions that every kind of layer uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

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
