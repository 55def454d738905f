"""Tiny random models for tests: every weight drawn away from its usual 0 or 1, so that none can be forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig

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


def config(family: str, **changes) -> MambaConfig | Mamba2Config:
    """Odd little sizes, so that no axis can pass for another."""
    if family in ("mamba", "falcon"):
        fields = {"d_model": 10, "n_layers": 2, "d_vocab": 17, "d_state": 3, "d_conv": 4, "dt_rank": 2}
        fields |= {"expand": 2, "mixer_norms": family == "falcon", "use_bias": family == "falcon"}
        return MambaConfig(**(fields | changes))
    fields = {"d_model": 6, "n_layers": 2, "d_vocab": 17, "d_state": 5, "d_conv": 4, "expand": 2, "head_dim": 3}
    fields |= {"tie_embeddings": False}
    if family == "mamba2-groups":
        fields |= {"n_groups": 2, "dt_limit": (0.05, 0.6), "use_bias": True, "tie_embeddings": True}
    return Mamba2Config(**(fields | changes))


def build(family_or_cfg: str | MambaConfig | Mamba2Config, seed: int = 0, **changes) -> HookedMamba | HookedMamba2:
    """A tiny model in float32, in evaluation mode."""
    cfg = config(family_or_cfg, **changes) if isinstance(family_or_cfg, str) else family_or_cfg
    cls = HookedMamba2 if isinstance(cfg, Mamba2Config) else HookedMamba
    return randomize(cls(cfg), seed).eval()


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
