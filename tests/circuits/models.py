"""Random models and prompts for the tests of circuits."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig
from tests.kinds import MAMBA

Model = HookedMamba | HookedMamba2


def random_model(seed: int, family: str | None = None, n_layers: int | None = None) -> Model:
    """A small float64 model of random shape, all biases and norm weights away from their start."""
    draw = random.Random(seed)
    family = family or draw.choice(MAMBA)
    common = {
        "d_model": draw.choice([4, 6, 10]), "n_layers": n_layers or draw.choice([1, 2, 3]), "d_vocab": 17,
        "d_state": draw.choice([1, 2, 4]), "d_conv": draw.choice([2, 3, 4]), "use_bias": draw.random() < 0.5,
        "conv_bias": draw.random() < 0.7, "tie_embeddings": draw.random() < 0.5,
    }  # fmt: skip
    if family == "mamba":
        norms = draw.random() < 0.3
        model: Model = HookedMamba(MambaConfig(**common, mixer_norms=norms), seed=seed)
    else:
        groups = draw.choice([1, 2])
        cfg = Mamba2Config(**common, head_dim=2, n_groups=groups, norm_groups=draw.choice([1, 2]), d_inner=8)
        model = HookedMamba2(cfg, seed=seed)
    model = model.double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "embed" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "in_proj" in name or "x_proj" in name:
                parameter.mul_(2)
    return model


def random_tokens(seed: int, batch: int = 1, length: int = 7) -> Tensor:
    """Token ids b l."""
    return torch.randint(0, 17, (batch, length), generator=torch.Generator().manual_seed(seed))
