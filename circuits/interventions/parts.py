"""What edits amount to inside one layer, in the real and the frozen model alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.interventions.edits import (
    CutHead,
    CutTokens,
    Intervention,
    OfCoder,
    OfState,
    ScaleError,
    ScaleFeature,
    ScaleState,
    SetFeature,
    counted,
)
from hooked_mamba.analysis.captured import channel_list, layer_list
from hooked_mamba.analysis.columns import Columns, column_mask
from hooked_mamba.analysis.cuts import Channels, Cut, StateChange
from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.tokens import Source
from hooked_mamba.models import HookedModel
from hooked_mamba.state import Padding
from saes.coder import SparseCoder
from saes.splicing import decoded_change
from saes.steering import Amount


def by_coder(edits: Sequence[Intervention]) -> list[tuple[SparseCoder, list[OfCoder]]]:
    """Each coder with its edits, in the order of their first mention."""
    found: dict[int, tuple[SparseCoder, list[OfCoder]]] = {}
    for edit in edits:
        if isinstance(edit, OfCoder):
            found.setdefault(id(edit.coder), (edit.coder, []))[1].append(edit)
    return list(found.values())


def coders_change(
    coder: SparseCoder,
    edits: Sequence[OfCoder],
    x: Float[Tensor, "b l d_in"],
    y: Float[Tensor, "b l d_out"],
    before: int | None = None,
    padding: Padding | None = None,
) -> Float[Tensor, "b l d_out"]:
    """decode(z') - decode(z) + error' - error: what edits of one coder add to what it predicts.

    Parameters
    ----------
    x, y
        What it reads and what it predicts.
    before
        Columns of earlier calls, while generating.
    padding
        Of the pass: negative positions count from each row's last real token.
    """
    wide = at_least_fp32(y)
    change = torch.zeros_like(wide)
    latents = [edit for edit in edits if isinstance(edit, ScaleFeature | SetFeature)]
    if latents:
        z = coder.encode(x)
        at = tuple(dict.fromkeys(edit.index for edit in latents))
        new = {i: z[..., i] for i in at}
        for edit in latents:
            now = new[edit.index]
            made = edit.value * torch.ones_like(now) if isinstance(edit, SetFeature) else edit.factor * now
            new[edit.index] = torch.where(chosen(edit.positions, now, before, padding), made, now)
        dz = torch.stack([new[i] - z[..., i] for i in at], -1)
        change = change + decoded_change(coder, dz, at).to(wide.dtype)
    share = torch.ones_like(wide[..., 0])
    for error in [edit for edit in edits if isinstance(edit, ScaleError)]:
        share = share * factors(error.positions, error.factor, share, before, padding)
    if bool((share != 1).any()):
        change = change + (share - 1).unsqueeze(-1) * (wide - coder(x).to(wide.dtype))
    return change


def chosen(
    positions: Columns, like: Float[Tensor, "b l"], before: int | None, padding: Padding | None
) -> Bool[Tensor, "b l"]:
    """Positions as a mask."""
    mask = column_mask(positions, like.shape[0], like.shape[1], before, like.device, padding)
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def factors(
    positions: Columns, factor: Amount, like: Float[Tensor, "b l"], before: int | None, padding: Padding | None
) -> Float[Tensor, "b l"]:
    """The factor at positions, 1 elsewhere."""
    return torch.where(chosen(positions, like, before, padding), factor * torch.ones_like(like), 1.0)


def cuts_of(model: HookedModel, edits: Sequence[Intervention]) -> list[Cut]:
    """All cuts; those that differ only in their sources are one, so that a hundred heads cost one scan a layer."""
    cells: dict[Any, list[tuple[Columns, Channels]]] = {}
    found: dict[Any, tuple[Columns, frozenset[int], Source]] = {}
    for edit in edits:
        if not isinstance(edit, CutHead | CutTokens):
            continue
        layers = frozenset(layer_list(model, edit.layer if isinstance(edit, CutHead) else edit.layers))
        targets = edit.targets
        named = (targets.start, targets.stop, targets.step) if isinstance(targets, slice) else targets
        key = (layers, edit.source, id(named) if isinstance(named, Tensor) else repr(named))
        found[key] = targets, layers, edit.source
        channels = channel_list(model, edit.channels, edit.layer) if isinstance(edit, CutHead) else None
        cells.setdefault(key, []).append((edit.sources, channels))
    return [Cut(tuple(cells[key]), targets, layers, source, "read") for key, (targets, layers, source) in found.items()]


def state_changes(model: HookedModel, edit: OfState) -> list[StateChange]:
    """One for each position; none for a factor of 1, since cutting a scan in two at the edit may round otherwise.

    Raises
    ------
    ValueError
        The value is no state of this layer.
    """
    if isinstance(edit, ScaleState) and edit.factor == 1:
        return []
    weight = model.embed.weight
    (layer,) = layer_list(model, edit.layer)
    channels, mixer = channel_list(model, edit.channels, layer), model.mixer(layer)
    memory = mixer.memory(mixer.initial_state(1, "meta"))
    if memory is None:
        raise ValueError(f"the mixer of layer {layer} has no state that could be edited")
    own, E, P = memory.shape[1:], mixer.width, mixer.head_width or 1
    lanes = (E // P, P, own.numel() // E)  # H P N
    here = torch.zeros(E, dtype=torch.bool, device=weight.device)
    here[slice(None) if channels is None else list(channels)] = True
    here = here.reshape(*lanes[:2], 1)
    factor = edit.factor if isinstance(edit, ScaleState) else 0.0
    scale = torch.ones(here.shape, dtype=at_least_fp32(weight).dtype, device=weight.device).masked_fill(here, factor)
    add = None
    if not isinstance(edit, ScaleState):
        value = torch.as_tensor(edit.value, dtype=scale.dtype, device=scale.device)
        try:
            value = value.expand(*value.shape[: max(0, value.ndim - len(own))], *own)
        except RuntimeError:
            raise ValueError(f"a state of layer {layer} is {list(own)}, got {list(value.shape)}") from None
        add = torch.where(here, value.reshape(*value.shape[: value.ndim - len(own)], *lanes), 0.0)
    return [StateChange(layer, t, scale, add) for t in counted(edit.positions)]
