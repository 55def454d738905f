"""The models that whole-model benchmarks share: one set of random weights in every library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_mamba import HookedMamba
from hooked_mamba.ops import ENVIRONMENT
from tests.benchmarks.contenders import backend_runs
from tests.benchmarks.sizes import Shape, Sizes


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Bind the scans of models to one backend."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def backends(sizes: Sizes, op: str = "selective_scan") -> list[str]:
    """The fast backends of a model's scan that run here."""
    return [name for name in ("torch", "numba") if backend_runs(op, name, sizes)]


def with_backend(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same call without gradients, its scans by one backend."""

    def call() -> Any:
        with backend(name), torch.no_grad():
            return run()

    return call


def tokens_for(sizes: Sizes, shape: Shape | None = None) -> Tensor:
    """Random tokens, none of them 0."""
    return torch.randint(1, sizes.d_vocab, shape or sizes.grad_shape, generator=torch.Generator().manual_seed(0))


def products(model: HookedMamba, shape: Shape) -> Callable[[], Any]:
    """The model's matrix products alone: what no implementation of it can do without."""
    cfg = model.cfg
    normal, inner, low = (torch.randn(*shape, width) for width in (cfg.d_model, cfg.E, cfg.R))

    @torch.no_grad()
    def run() -> None:
        for block in model.blocks:
            mixer = block.mixer
            F.linear(normal, mixer.in_proj.weight)
            F.linear(inner, mixer.x_proj.weight)
            F.linear(low, mixer.dt_proj.weight)
            F.linear(inner, mixer.out_proj.weight)
        F.linear(normal, model.unembed.weight)

    return run


def shape_text(sizes: Sizes) -> str:
    """The model's shape in words."""
    return f"d={sizes.d_model}, {sizes.n_layers} layers, vocabulary {sizes.d_vocab}, random weights, float32"
