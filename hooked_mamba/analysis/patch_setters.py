"""Patch setters: which part of the corrupted activation the clean one replaces, by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

PatchSetter = Callable[[Tensor, Sequence[int], Tensor], Tensor]
"""(corrupted activation, index, clean activation) -> patched activation; may write into the first."""


def layer_pos_patch_setter(corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor) -> Tensor:
    """index = (layer, pos): everything at one position."""
    _, pos = index
    corrupted_activation[:, pos] = clean_activation[:, pos]
    return corrupted_activation


def layer_head_vector_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, head or channel): that unit at all positions."""
    _, unit = index
    corrupted_activation[:, :, unit] = clean_activation[:, :, unit]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, pos, head or channel): that unit at one position."""
    _, pos, unit = index
    corrupted_activation[:, pos, unit] = clean_activation[:, pos, unit]
    return corrupted_activation


AT_ONE_POSITION = (layer_pos_patch_setter, layer_pos_head_vector_patch_setter)
"""Setters that change the position of their index alone."""


def layer_pos_state_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, pos), of the site "h": the whole state after one position."""
    return clean_activation


def layer_pos_state_dim_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, pos, state), of the site "h": one of the N states of all channels after one position."""
    corrupted_activation[..., index[2]] = clean_activation[..., index[2]]
    return corrupted_activation


def layer_pos_state_unit_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, pos, head or channel), of the site "h": one unit's whole state after one position."""
    corrupted_activation[:, index[2]] = clean_activation[:, index[2]]
    return corrupted_activation


def layer_head_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, head), of the sites "pattern" and "attn_scores": a head's rows for all positions."""
    corrupted_activation[:, index[1]] = clean_activation[:, index[1]]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """index = (layer, head, pos), of the same sites: a head's row for one position."""
    _, head, pos = index
    corrupted_activation[:, head, pos] = clean_activation[:, head, pos]
    return corrupted_activation
