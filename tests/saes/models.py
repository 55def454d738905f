"""Tiny models with coders on them."""

from __future__ import annotations

import torch

from hooked_mamba import HookedMamba, HookedMamba2
from saes import SparseCoder, mambacoder_config, sae_config
from tests.hooked_mamba.tiny import build

Model = HookedMamba | HookedMamba2


def tiny(family: str = "mamba", **changes) -> Model:
    """In float64, so that rounding hides nothing."""
    return build(family, **changes).double()


def noisy(coder: SparseCoder, seed: int = 1) -> SparseCoder:
    """In float64, with random values in every parameter."""
    coder = coder.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.mul(0.1) if name != "threshold" else noise.abs().mul(0.1))
    return coder


def sae_on(model: Model, site: str, d_sae: int = 24, architecture: str = "topk", k: int = 3) -> SparseCoder:
    """An untrained SAE of any site."""
    d = model.site(site).width
    return noisy(SparseCoder(sae_config(site, d, d_sae, architecture=architecture, k=k), seed=0))


def mambacoder_on(model: Model, layer: int, d_sae: int = 24, **fields) -> SparseCoder:
    """An untrained MambaCoder of a block."""
    fields = {"architecture": "topk", "k": 3, **fields}
    return noisy(SparseCoder(mambacoder_config(layer, model.cfg.d_model, d_sae, **fields), seed=layer))
