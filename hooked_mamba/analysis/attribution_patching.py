"""Attribution patching: a whole sweep of activation patches to first order, from one forward and one backward pass.

    metric(patched) ~ metric(corrupted) + sum (clean - corrupted) . d metric / d activation

(Nanda 2023; Syed, Rager & Conmy 2023, arXiv:2310.10348.) `correlation` measures how close the estimate is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.patch_runs import Metric
from hooked_mamba.analysis.patching import CleanValues, index_list

_AXIS = {"pos": 1, "channel": 2, "head": 2, "head_index": 2, "state": -1}
"""Index axis -> axis of the activation."""


def attribution_patch(
    model: Any,
    corrupted_tokens: Tensor | str | Sequence[str],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    activation_name: str,
    index_axis_names: Sequence[str],
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "..."]:
    """First-order estimate of what `generic_activation_patch` would return, same shape and meaning.

    Parameters
    ----------
    patching_metric
        From logits b l V to one number, differentiable.
    activation_name, index_axis_names
        As in `generic_activation_patch`; "h" with "pos" estimates patches of the travelling state.
    """
    tokens, found = model.input_to_tokens(corrupted_tokens)
    attention_mask = found if attention_mask is None else attention_mask
    length = tokens.shape[1]
    index_list(model, length, activation_name, index_axis_names, None)  # checks the names
    clean = CleanValues(model, clean_cache, activation_name, tokens.shape, index_axis_names)
    n_layers = model.cfg.n_layers
    if clean.by_state:
        names = [model.act_name(f"h.{t}", i) for i in range(n_layers) for t in range(length)]
    else:
        names = [model.act_name(activation_name, i) for i in range(n_layers)]
    metric, values, gradients = values_and_gradients(model, tokens, patching_metric, names, attention_mask)

    rows = []
    for i in range(n_layers):
        if clean.by_state:
            mine = range(i * length, (i + 1) * length)
            value, gradient = (torch.stack([source[names[j]] for j in mine], 1) for source in (values, gradients))
            difference = clean.states(i) - value
        else:
            value, gradient = values[names[i]], gradients[names[i]]
            difference = clean.value((i,)) - value
        product = difference * gradient
        kept = [_AXIS[axis] % product.ndim for axis in index_axis_names[1:]]
        summed = product.sum([axis for axis in range(product.ndim) if axis not in kept]) if kept else product.sum()
        order = sorted(kept)
        rows.append(summed.permute([order.index(axis) for axis in kept]) if kept else summed)
    return metric + torch.stack(rows)


def like(
    sweep: partial,
    model: Any,
    corrupted_tokens: Tensor | str | Sequence[str],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "..."]:
    """The estimate of a ready-made sweep: `like(get_act_patch_resid_pre, model, tokens, clean_cache, metric)`."""
    known = sweep.keywords
    return attribution_patch(
        model,
        corrupted_tokens,
        clean_cache,
        patching_metric,
        known["activation_name"],
        known["index_axis_names"],
        attention_mask,
    )


def values_and_gradients(
    model: Any, tokens: Tensor, metric: Metric, names: Sequence[str], attention_mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The metric of a run, each site's value, and the metric's gradient there. Parameters get no gradient."""
    held: dict[str, Tensor] = {}

    def hold(value: Tensor, hook: Any) -> Tensor:
        held[hook.name] = value if value.requires_grad else value.detach().requires_grad_()
        return held[hook.name]

    with torch.enable_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(n, hold) for n in names], attention_mask=attention_mask)
        total = metric(logits)
        if total.numel() != 1:
            raise ValueError(f"the metric must give one number to be differentiated, got {list(total.shape)}")
        found = torch.autograd.grad(total, [held[n] for n in names], allow_unused=True)
    gradients = {n: torch.zeros_like(held[n]) if g is None else g for n, g in zip(names, found, strict=True)}
    return total.detach(), {n: held[n].detach() for n in names}, gradients


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two sweeps.

    Raises
    ------
    ValueError
        The shapes differ, or one sweep is constant, so that no correlation exists.
    """
    if a.shape != b.shape:
        raise ValueError(f"the sweeps differ in shape: {list(a.shape)} and {list(b.shape)}")
    a, b = (v.detach().double().flatten() - v.detach().double().mean() for v in (a, b))
    size = a.norm() * b.norm()
    if size == 0:
        raise ValueError("one of the sweeps is constant: it correlates with nothing")
    return float(a @ b / size)
