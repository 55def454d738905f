"""Path patching: the effect of one branch's output through another branch's input alone.

1. The sender's clean output replaces its corrupted one on the way to the receiver only: the receiver reads the
   corrupted residual stream plus the difference. (All branches in between keep their corrupted outputs.)
2. What then comes out of the receiver (or arrives at one of its sites) is patched into the corrupted run.
3. All later blocks run from there.

Goldowsky-Dill et al. 2023, arXiv:2304.05969.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.captured import Positions, position_mask
from hooked_mamba.analysis.patch_runs import Metric, residuals
from hooked_mamba.state import Padding

Place = tuple[int, str]
"""A branch: its block and its name there."""


def path_places(model: Any) -> list[Place]:
    """Every branch that writes into the stream, in order of computation: the senders after the embedding, and the
    receivers."""
    return [(i, name) for i in range(model.cfg.n_layers) for name in model.block(i).written]


@torch.no_grad()
def path_patch(
    model: Any,
    corrupted_tokens: Tensor | str | Sequence[str],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    receiver_site: str | None = None,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
    progress: bool = True,
    batch_size: int = 32,
) -> Float[Tensor, "sender receiver"]:
    """The metric after patching every direct path from a sender to a receiver.

    Parameters
    ----------
    clean_cache
        Holds the embedding and what every branch adds.
    patching_metric
        From logits b l V to one number.
    receiver_site
        Which site of the receiver the effect passes through. None (or "out_proj"): what the branch adds; "x_pre", "z",
        "dt", "B" or "C": one of a mixer's inputs, which every receiver must have.
    positions
        Where the sender's output is patched; None: everywhere.
    batch_size
        Rows of one forward pass: several senders run side by side.

    Returns
    -------
    Tensor
        Rows: the embedding, then the branches in order of computation (:func:`path_places`; mixer 0, 1, ... where
        blocks have nothing else); columns: the branches, then the logits. NaN where the sender is not before the
        receiver: branches of one stage read the same stream.
    """
    tokens, found = model.input_to_tokens(corrupted_tokens)
    attention_mask = found if attention_mask is None else attention_mask
    b, length = tokens.shape
    n, places = model.cfg.n_layers, path_places(model)
    entering = residuals(model, tokens, attention_mask)
    names = ["hook_embed", *(f"blocks.{i}.{model.block(i).written[name]}" for i, name in places)]
    _, corrupted = model.run_with_cache(tokens, attention_mask=attention_mask, names_filter=names, return_type=None)
    padding = None if attention_mask is None else Padding.from_mask(attention_mask, tokens.shape, tokens.device)
    where = position_mask(positions, b, length, tokens.device, padding).unsqueeze(-1)
    changes = []
    for name in names:
        clean = clean_cache[name] if clean_cache.has_batch_dim else clean_cache[name][None]
        if clean.shape != corrupted[name].shape:
            raise ValueError(
                f"the clean run is {list(clean.shape[:2])} (batch, position) and the corrupted one {[b, length]};"
                " patching needs prompts of the same length"
            )
        changes.append((clean - corrupted[name]) * where)

    result = torch.full((len(places) + 1, len(places) + 1), torch.nan)
    at_once = max(1, batch_size // b)
    receivers: list[Place | None] = [*places, None]
    steps = []
    for r, receiver in enumerate(receivers):
        before = len(changes) if receiver is None else 1 + sum(_is_before(model, one, receiver) for one in places)
        steps += [(r, list(range(f, min(f + at_once, before)))) for f in range(0, before, at_once)]
    for r, senders in tqdm(steps, disable=not progress, desc="path patching"):
        many = len(senders)
        change = torch.cat([changes[sender] for sender in senders])
        given = {
            "attention_mask": None if attention_mask is None else attention_mask.repeat(many, 1),
            "tokens": tokens.repeat(many, 1),
        }
        receiver = receivers[r]
        if receiver is None:
            stream = entering[n].repeat(many, 1, 1)
            logits = model(stream + change.to(stream.dtype), start_at_layer=n, **given)
        else:
            layer, branch = receiver
            stream = entering[layer].repeat(many, 1, 1)
            usual = receiver_site in (None, "out_proj")
            site = names[r + 1] if usual else model.act_name(receiver_site, layer, branch)
            read = "hook_resid_mid" if _stage(model, receiver) else "hook_resid_pre"

            def add(value: Tensor, hook: Any, change: Tensor = change) -> Tensor:
                return value + change.to(value.dtype)

            _, arrived = model.run_with_cache(
                stream,
                start_at_layer=layer,
                stop_at_layer=layer + 1,
                names_filter=site,
                fwd_hooks=[(f"blocks.{layer}.{read}", add)],
                **given,
            )
            with model.hooks([(site, lambda value, hook, new=arrived[site]: new)]):
                logits = model(stream, start_at_layer=layer, **given)
        for sender, one in zip(senders, logits.split(b), strict=True):
            result[sender, r] = patching_metric(one)
    return result


def _stage(model: Any, place: Place) -> int:
    """Which stage of its block a branch stands in; all of a block with a shared transformer reads the stream once."""
    block = model.block(place[0])
    if f"blocks.{place[0]}.hook_resid_mid" not in model.hook_dict:
        return 0
    return next(i for i, stage in enumerate(block.stages) if place[1] in stage)


def _is_before(model: Any, sender: Place, receiver: Place) -> bool:
    return (sender[0], _stage(model, sender)) < (receiver[0], _stage(model, receiver))
