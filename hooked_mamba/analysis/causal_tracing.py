"""Causal tracing: where a fact is recalled. Add noise to the subject, restore one activation, see if the answer
returns.

Meng et al. 2022, arXiv:2202.05262; on Mamba: Sharma, Atkinson & Bau 2024, arXiv:2404.03646.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.analysis.captured import Positions, position_mask
from hooked_mamba.analysis.patch_runs import Patch, run_patches
from hooked_mamba.display import Shown


@dataclass(frozen=True)
class CausalTrace(Shown):
    """Probabilities of the answer."""

    restored: Float[Tensor, "layer pos"]
    """With one site restored at one position (and in a window of layers), the mean over noises."""
    clean: float
    """Without noise."""
    corrupted: float
    """With noise and nothing restored."""


@torch.no_grad()
def causal_trace(
    model: Any,
    tokens: Int[Tensor, "..."] | str,
    answer: int | str,
    subject: Positions,
    site: str = "out_proj",
    noise: float | None = None,
    samples: int = 8,
    window: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> CausalTrace:
    """Trace one prompt.

    Parameters
    ----------
    tokens
        One prompt, text or tokens.
    answer
        The token that should come next.
    subject
        Positions whose embeddings get noise.
    site
        Short name of what is restored, layer by position.
    noise
        Standard deviation; None: three times that of the model's embeddings.
    samples
        Number of noise draws.
    window
        Layers restored together: layer i stands for i to i + window - 1, up to the last layer.
    """
    ids, _ = model.input_to_tokens(tokens)
    if ids.shape[0] != 1:
        raise ValueError(f"causal tracing takes one prompt, got {ids.shape[0]}")
    if samples < 1 or window < 1:
        raise ValueError(f"samples and window must be 1 or more, got {samples} and {window}")
    token = model.to_single_token(answer) if isinstance(answer, str) else answer
    n_layers, length = model.cfg.n_layers, ids.shape[1]
    names = [model.act_name(site, i) for i in range(n_layers)]
    logits, clean = model.run_with_cache(ids, names_filter=names)
    blurred = position_mask(subject, 1, length, ids.device).unsqueeze(-1)
    scale = 3 * model.embed.weight.float().std() if noise is None else noise
    generator = torch.Generator().manual_seed(seed)
    shift = (torch.randn(samples, length, model.cfg.d_model, generator=generator) * float(scale)).to(ids.device)
    shift = shift * blurred

    def blur(value: Tensor, hook: Any) -> Tensor:
        return value + shift.to(value.dtype)

    def patches_at(layer: int, pos: int) -> Patch:
        def restore(value: Tensor) -> Tensor:
            value[:, pos] = clean[names[layer]][:, pos].to(value.dtype)
            return value

        return Patch(names[layer], restore)

    def probability(logits: Tensor) -> Tensor:
        return logits[:, -1].softmax(-1)[:, token].mean()

    rows = ids.repeat(samples, 1)
    with model.hooks([("hook_embed", blur)]):
        corrupted = float(probability(model(rows)))
        indices = [(i, t) for i in range(n_layers) for t in range(length)]
        if window == 1:
            patches = [patches_at(i, t) for i, t in indices]
            values = run_patches(model, rows, patches, probability, None, batch_size, progress, "causal tracing")
        else:
            values = torch.stack([_windowed(model, rows, names, clean, i, t, window, probability) for i, t in indices])
    return CausalTrace(values.reshape(n_layers, length), float(probability(logits)), corrupted)


def _windowed(
    model: Any, rows: Tensor, names: Sequence[str], clean: Any, layer: int, pos: int, window: int, metric: Any
) -> Tensor:
    def restore(value: Tensor, hook: Any) -> Tensor:
        value[:, pos] = clean[hook.name][:, pos].to(value.dtype)
        return value

    return metric(model.run_with_hooks(rows, fwd_hooks=[(n, restore) for n in names[layer : layer + window]]))
