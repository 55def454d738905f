"""Path patching: the effect of one branch's output through another branch's input alone.

1. The sender's clean output replaces its corrupted one on the way to the receiver only: the receiver reads what it read
   in the corrupted run plus the difference. (All branches in between keep their corrupted outputs.)
2. What then comes out of the receiver (or arrives at one of its sites) is patched into the corrupted run.
3. All later blocks run from there.

In a block with a shared transformer (Zamba) the direct paths are: stream and embedding -> its attention -> its MLP ->
the mixer; and the stream past the transformer -> the mixer.

Goldowsky-Dill et al. 2023, arXiv:2304.05969.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.captured import Positions, position_mask
from hooked_mamba.analysis.patch_runs import Metric, residuals
from hooked_mamba.frozen.places import out_site
from hooked_mamba.state import Padding

Place = tuple[int, str]
"""A branch: its block and its name there."""

EMBEDDING = -1
"""The embedding among senders; the others are numbers of places."""


def path_places(model: Any) -> list[Place]:
    """Every branch, in order of computation: the senders after the embedding, and the receivers."""
    return [(i, name) for i in range(model.cfg.n_layers) for name in model.block(i).branches]


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
        Holds the embedding and the output of every branch.
    patching_metric
        From logits b l V to one number.
    receiver_site
        Which site of the receiver the effect passes through. None (or "out_proj"): its output; "x_pre", "z", "dt", "B"
        or "C": one of a mixer's inputs, which every receiver must have.
    positions
        Where the sender's output is patched; None: everywhere.
    batch_size
        Rows of one forward pass: several senders run side by side.

    Returns
    -------
    Tensor
        Rows: the embedding, then the branches in order of computation (:func:`path_places`; mixer 0, 1, ... where
        blocks have nothing else); columns: the branches, then the logits. NaN where the receiver does not read what the
        sender writes: branches of one stage read the same stream.
    """
    tokens, found = model.input_to_tokens(corrupted_tokens)
    attention_mask = found if attention_mask is None else attention_mask
    b, length = tokens.shape
    n, places = model.cfg.n_layers, path_places(model)
    entering = residuals(model, tokens, attention_mask)
    names = ["hook_embed", *(out_site(model, *place) for place in places)]
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
    steps = [
        (r, door, senders[f : f + at_once])
        for r, receiver in enumerate([*places, None])
        for door, senders in _senders(model, receiver, places).items()
        for f in range(0, len(senders), at_once)
    ]
    for r, door, senders in tqdm(steps, disable=not progress, desc="path patching"):
        many = len(senders)
        change = torch.cat([changes[sender + 1] for sender in senders])
        given: dict[str, Any] = {
            "attention_mask": None if attention_mask is None else attention_mask.repeat(many, 1),
            "tokens": tokens.repeat(many, 1),
        }
        if door is None:
            stream = entering[n].repeat(many, 1, 1)
            logits = model(stream + change.to(stream.dtype), start_at_layer=n, **given)
        else:
            layer, branch = places[r]
            stream = entering[layer].repeat(many, 1, 1)
            usual = receiver_site in (None, "out_proj")
            site = names[r + 1] if usual else model.act_name(receiver_site, layer, branch)
            if door.through is not None:
                change = model.get_submodule(door.through)(change)

            def add(value: Tensor, hook: Any, change: Tensor = change) -> Tensor:
                return value + change.to(value.dtype)

            _, arrived = model.run_with_cache(
                stream,
                start_at_layer=layer,
                stop_at_layer=layer + 1,
                names_filter=site,
                fwd_hooks=[(door.site, add)],
                **given,
                **({"carry": {"embed": corrupted["hook_embed"].repeat(many, 1, 1) + change}} if door.embedding else {}),
            )
            with model.hooks([(site, lambda value, hook, new=arrived[site]: new)]):
                logits = model(stream, start_at_layer=layer, **given)
        for sender, one in zip(senders, logits.split(b), strict=True):
            result[sender + 1, r] = patching_metric(one)
    return result


class Door(NamedTuple):
    """Where a receiver reads some senders."""

    site: str
    """The site to which their change is added."""
    through: str | None = None
    """A layer that the change passes first."""
    embedding: bool = False
    """Whether the receiver reads the embedding itself as well."""


def _senders(model: Any, receiver: Place | None, places: Sequence[Place]) -> dict[Door | None, list[int]]:
    """The senders that a receiver (None: the logits) reads, by where it does."""
    stream = [s for s, place in enumerate(places) if place[1] in model.block(place[0]).written]
    if receiver is None:
        return {None: [EMBEDDING, *stream]}
    layer, name = receiver
    block, at = model.block(layer), f"blocks.{layer}."
    before = [s for s in stream if (places[s][0], _stage(model, places[s])) < (layer, _stage(model, receiver))]
    if not block.beside:
        read = "hook_resid_mid" if _stage(model, receiver) else "hook_resid_pre"
        return {Door(at + read): [EMBEDDING, *before]}
    if name not in block.beside:
        last = places.index((layer, block.beside[-1]))
        return {
            Door(at + "hook_mixer_in"): [EMBEDDING, *before],
            Door(at + "hook_shared_out", through=at + "linear"): [last],
        }
    place = block.beside.index(name)
    if place:
        sender = (layer, block.beside[place - 1])
        return {Door(out_site(model, *sender)): [places.index(sender)]}
    return {Door(at + "hook_resid_pre", embedding=True): [EMBEDDING], Door(at + "hook_resid_pre"): before}


def _stage(model: Any, place: Place) -> int:
    """Which stage of its block a branch stands in; all of a block with a shared transformer counts as one."""
    block = model.block(place[0])
    if f"blocks.{place[0]}.hook_resid_mid" not in model.hook_dict:
        return 0
    return next(i for i, stage in enumerate(block.stages) if place[1] in stage)
