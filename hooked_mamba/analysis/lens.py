"""The logit lens: what the model would predict if it stopped after each block.

nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.components import at_least_fp32
from hooked_mamba.display import Shown
from hooked_mamba.hooks.positions import PosSlice


@torch.no_grad()
def logit_lens(
    cache: ActivationCache,
    layers: Sequence[int] | None = None,
    pos_slice: PosSlice = None,
    frozen_norm: bool = False,
    vocab: Int[Tensor, " v"] | None = None,
    incl_mid: bool = False,
) -> Float[Tensor, "..."]:
    """Logits of the residual stream entering each block, and, last, of the whole model.

    Parameters
    ----------
    cache
        Of a full run; holds resid_pre of all layers, the last resid_post, and the final norm's scale if frozen.
    layers
        Which streams: i is the one entering block i, n_layers the last; negative ones count from the last. None: all.
    pos_slice
        Positions; an int drops the axis.
    frozen_norm
        False: each stream is divided by its own scale, as the final norm would. True: by the run's scale, so that
        differences between layers are what the mixers in between add.
    vocab
        Only these tokens' logits; None: all.
    incl_mid
        Also the streams between the two stages of a block, in computing order (see :func:`lens_labels`).

    Returns
    -------
    Tensor
        layer, batch, position, vocabulary; the last of all layers is the model's logits.
    """
    model: Any = cache.model
    n = model.cfg.n_layers
    chosen = range(n + 1) if layers is None else [layer % (n + 1) for layer in layers]
    streams = []
    for i in chosen:
        streams.append(cache.resid_entering(i, pos_slice))
        if incl_mid and f"blocks.{i}.hook_resid_mid" in model.hook_dict:
            streams.append(cache.at(cache["resid_mid", i], pos_slice))
    stack = torch.stack(streams)
    normed = cache.apply_ln_to_stack(stack, -1, pos_slice=pos_slice, recompute_ln=not frozen_norm)
    W_U = model.W_U if vocab is None else model.W_U[:, vocab]
    logits = at_least_fp32(normed.to(W_U.dtype) @ W_U)
    return logits if model.logit_multiplier is None else logits * model.logit_multiplier


@dataclass(frozen=True)
class LensReading(Shown):
    """The likeliest tokens at each layer of a lens."""

    tokens: Int[Tensor, "layer ... k"]
    probs: Float[Tensor, "layer ... k"]
    kl: Float[Tensor, "layer ..."]
    """KL(final || layer) in nats: how far each layer is from what the model says in the end."""


def read_lens(logits: Float[Tensor, "layer ..."], k: int = 5) -> LensReading:
    """Top tokens, their probabilities, and the distance from the last layer of a lens."""
    log_probs = logits.log_softmax(-1)
    final = log_probs[-1:]
    kl = (final.exp() * (final - log_probs)).sum(-1)
    top = log_probs.topk(min(k, logits.shape[-1]))
    return LensReading(top.indices, top.values.exp(), kl)


def lens_labels(cache: ActivationCache, incl_mid: bool = False) -> list[str]:
    """Names of a full lens' layers."""
    model: Any = cache.model
    labels = ["embed"]
    for i in range(model.cfg.n_layers):
        labels += [f"within {i}"] if incl_mid and f"blocks.{i}.hook_resid_mid" in model.hook_dict else []
        labels.append(f"after {i}")
    return labels
