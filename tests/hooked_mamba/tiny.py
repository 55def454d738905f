"""Tiny random models for tests: every weight drawn away from its usual 0 or 1, so that none can be forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hooked_mamba import HookedModel, Mamba2Config, MambaConfig
from hooked_mamba.config import HeadedMambaConfig, ModelConfig
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig, MLPConfig, MoEConfig, ShortConvConfig
from hooked_mamba.model.hooked_model import model_class
from hooked_mamba.recurrent_config import DeltaNetConfig, Mamba3Config, Mamba3MIMOConfig, RWKV7Config

FAMILIES = ("mamba", "falcon", "mamba2", "mamba2-groups")
"""Kinds of tiny models; the two main ones are the first and third."""


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters anew, by what their names say, with logits of size 2-4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor) -> Tensor:
        return torch.empty(p.shape, dtype=torch.float64).normal_(generator=generator)

    done = set()
    for name, p in model.named_parameters():
        if id(p) in done:
            continue
        done.add(id(p))
        kind = name.rpartition(".")[2] if name.endswith(("A_log", "D", "dt_bias", "bias")) else name
        if kind == "A_log":
            value = normal(p) * 0.7 + 0.3
        elif kind == "D":
            value = normal(p) * 0.5 + 1
        elif kind == "dt_bias" or name.endswith("dt_proj.bias"):
            value = normal(p) - 1.5
        elif kind == "bias":
            value = normal(p) * 0.3
        elif p.ndim == 1:
            value = normal(p) * 0.3 + 1
        elif "embed" in name or "lm_head" in name:
            value = normal(p) / math.sqrt(p.shape[1]) * 1.5
        else:
            value = normal(p) / math.sqrt(p[0].numel()) * 1.2
        p.copy_(value)
    return model


STACK = {"d_model": 6, "n_layers": 2}
ATTENTION = AttentionConfig(**STACK, n_heads=4, n_key_value_heads=2, d_head=4, rotary_dim=2, qkv_bias=True)
MLP = MLPConfig(**STACK, d_mlp=7)
MOE = MoEConfig(**STACK, n_experts=3, top_k=2, d_mlp=5)


def hybrid(mixer, *layout: tuple[tuple[str, ...], ...], **changes) -> HybridConfig:
    """Two blocks of a mixer with attention, MLP and experts around it."""
    branches = {"mixer": mixer, "attn": ATTENTION, "mlp": MLP, "moe": MOE}
    used = {name: branches[name] for name in branches if any(name in stage for block in layout for stage in block)}
    fields = {"d_vocab": 17, "branches": used, "layout": layout, "tie_embeddings": False, **STACK}
    return HybridConfig(**(fields | changes))


def mamba(**changes) -> MambaConfig:
    fields = {"d_model": 10, "n_layers": 2, "d_vocab": 17, "d_state": 3, "d_conv": 4, "dt_rank": 2, "expand": 2}
    return MambaConfig(**(fields | changes))


def mamba2(**changes) -> Mamba2Config:
    fields = {"d_model": 6, "n_layers": 2, "d_vocab": 17, "d_state": 5, "d_conv": 4, "expand": 2, "head_dim": 3}
    return Mamba2Config(**({"tie_embeddings": False} | fields | changes))


def rwkv7(**changes) -> RWKV7Config:
    ranks = {"decay_rank": 3, "rate_rank": 2, "value_rank": 4, "gate_rank": 5}
    return RWKV7Config(**(STACK | {"d_vocab": 17, "head_dim": 3, "d_mlp": 7} | ranks | changes))


def gated_deltanet(**changes) -> HybridConfig:
    mixer = DeltaNetConfig(**STACK, n_key_heads=2, n_value_heads=4, key_dim=3, value_dim=5)
    return hybrid(mixer, (("mixer",), ("mlp",)), (("mixer", "attn"), ("moe",)), **changes)


def mamba3(**changes) -> HybridConfig:
    mixer = Mamba3Config(**STACK, A_act="softplus", d_state=5, head_dim=3, n_groups=2)
    return hybrid(mixer, (("mixer",), ("mlp",)), (("mixer",), ("mlp",)), **changes)


def mamba3_mimo(**changes) -> HybridConfig:
    mixer = Mamba3MIMOConfig(**STACK, A_act="softplus", d_state=4, head_dim=3, n_groups=2, mimo_rank=2)
    return hybrid(mixer, (("mixer",), ("mlp",)), (("mixer",), ("mlp",)), **changes)


def mamba_heads(**changes) -> HybridConfig:
    sizes = {"d_vocab": 17, "d_state": 3, "d_inner": 8, "dt_rank": 2, "n_heads": 2}
    return hybrid(HeadedMambaConfig(**STACK, **sizes), (("mixer",),), (("attn",), ("mixer",)), **changes)


def short_conv(**changes) -> HybridConfig:
    return hybrid(ShortConvConfig(**STACK), (("mixer",), ("mlp",)), (("mixer",), ("mlp",)), **changes)


TINY: dict[str, Callable[..., ModelConfig]] = {
    "mamba": mamba,
    "mamba2": mamba2,
    "rwkv7": rwkv7,
    "gated_deltanet": gated_deltanet,
    "mamba3": mamba3,
    "mamba3_mimo": mamba3_mimo,
    "mamba_heads": mamba_heads,
    "short_conv": short_conv,
    "falcon": lambda **changes: mamba(**({"mixer_norms": True, "use_bias": True} | changes)),
    "mamba2-groups": lambda **changes: mamba2(
        **({"n_groups": 2, "dt_limit": (0.05, 0.6), "use_bias": True, "tie_embeddings": True} | changes)
    ),
}
"""Kind of mixer, or a variant of one -> a config of odd little sizes, so that no axis can pass for another."""


def config(kind: str, **changes) -> ModelConfig:
    """The tiny config of a kind, with some fields changed."""
    return TINY[kind](**changes)


def build(kind_or_cfg: str | ModelConfig, seed: int = 0, **changes) -> HookedModel:
    """A tiny model in float32, in evaluation mode."""
    cfg = config(kind_or_cfg, **changes) if isinstance(kind_or_cfg, str) else kind_or_cfg
    return randomize(model_class(cfg)(cfg), seed).eval()


def tokens_for(model, rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.cfg.d_vocab, (rows, length), generator=generator)


def arrays(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A state dict as float64 arrays."""
    return {name: value.detach().double().numpy() for name, value in state_dict.items()}


def relative(got, expected) -> float:
    """Largest difference, as a part of the largest expected magnitude."""
    got, expected = (t.detach().double().numpy() if isinstance(t, Tensor) else np.asarray(t) for t in (got, expected))
    assert got.shape == expected.shape, f"{got.shape} against {expected.shape}"
    assert np.isfinite(expected).all(), "the expected values are not finite"
    return float(np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-300))
