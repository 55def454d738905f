"""Quantised weights of MLX folders: whole numbers of a few bits, and for each group of a row a scale and a bias.

A weight is q scale + bias. The q of a row are one stream of bits, lowest first, in 32-bit words. What is computed here
is float32, whatever scales and biases are stored in; mlx itself rounds its result to their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooked_mamba.loading.shapes import fresh, only_shapes, shapes_only
from hooked_mamba.loading.tables import CheckpointError, LazyState, Place

__all__ = ["dequantised"]

BITS = (2, 3, 4, 5, 6, 8)
ELEMENTS_AT_ONCE = 2**18


class Grouping(NamedTuple):
    """How one weight is quantised."""

    group_size: int
    bits: int


def _grouping(quantization: Mapping[str, Any], layer: str) -> Grouping:
    """That of a layer: its own entry in config.json, or the one for all.

    Raises
    ------
    CheckpointError
        Another way to quantise, or numbers that cannot be meant.
    """
    own = quantization.get(layer)
    given = own if isinstance(own, Mapping) else quantization
    where = f"quantization of {layer}" if given is own else "quantization"
    mode = given.get("mode", "affine")
    if mode != "affine":
        raise CheckpointError(
            f"config.json: the {where} has mode={mode!r}, which is not read here; expected 'affine': convert the"
            " checkpoint that it was made from again, or dequantise it with `mlx_lm.convert --dequantize`"
        )
    group_size, bits = given.get("group_size", 64), given.get("bits", 4)
    if not isinstance(group_size, int) or not isinstance(bits, int) or group_size < 1 or bits not in BITS:
        raise CheckpointError(
            f"config.json: the {where} has bits={bits!r} and group_size={group_size!r}; expected bits of"
            f" {', '.join(map(str, BITS))} and a whole number"
        )
    return Grouping(group_size, bits)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The whole numbers in rows of 32-bit words, as float32."""
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream.float()
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((stream[..., None] >> shifts) & (2**bits - 1)).flatten(-2).float()
    eight = stream.unflatten(-1, (-1, bits)).long()  # eight numbers in `bits` bytes
    joined = (eight << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
    return ((joined >> torch.arange(0, 8 * bits, bits)) & (2**bits - 1)).flatten(-2).float()


def _check(words: Tensor, scales: Tensor, biases: Tensor, how: Grouping, place: Place) -> tuple[int, ...]:
    """The weight's shape.

    Raises
    ------
    CheckpointError
        The three tensors do not belong together.
    """
    if words.dtype != torch.uint32:
        raise CheckpointError(f"{place} is {words.dtype}, which no quantised weight is; expected torch.uint32")
    width = words.shape[-1] * 32 // how.bits
    shape, groups = (*words.shape[:-1], width), (*words.shape[:-1], width // how.group_size)
    if words.ndim < 2 or width % how.group_size or tuple(scales.shape) != groups or tuple(biases.shape) != groups:
        raise CheckpointError(
            f"{place} has {tuple(words.shape)} words of {how.bits} bits in groups of {how.group_size}, scales"
            f" {tuple(scales.shape)} and biases {tuple(biases.shape)}; expected scales and biases {groups}"
        )
    if not scales.is_floating_point() or not biases.is_floating_point():
        raise CheckpointError(f"the scales of {place} are {scales.dtype}; expected floating point")
    return shape


def _weight(parts: Callable[[], tuple[Tensor, Tensor, Tensor]], how: Grouping, place: Place) -> Callable[[], Tensor]:
    def read() -> Tensor:
        words, scales, biases = parts()
        shape = _check(words, scales, biases, how, place)
        if shapes_only():
            return torch.empty(shape, device="meta")
        found = torch.empty(shape)
        rows, groups = found.view(-1, shape[-1]), scales.shape[-1]
        flat = words.reshape(-1, words.shape[-1]), scales.reshape(-1, groups), biases.reshape(-1, groups)
        at_once = max(1, ELEMENTS_AT_ONCE // shape[-1])
        for target, q, scale, bias in zip(rows.split(at_once), *(part.split(at_once) for part in flat), strict=True):
            grouped = target.unflatten(-1, (groups, -1))
            grouped.copy_(unpacked(q, how.bits).unflatten(-1, (groups, -1)))
            grouped.mul_(scale.float()[..., None]).add_(bias.float()[..., None])
        return fresh(found)

    return read


def dequantised(state: LazyState, quantization: Mapping[str, Any]) -> LazyState:
    """The same tensors with each weight that has scales taken back to float32 when it is read.

    Parameters
    ----------
    state
        The folder's tensors.
    quantization
        That field of config.json: bits and group size for all, and by layer where one has its own.

    Raises
    ------
    CheckpointError
        Another way to quantise, or a weight without its biases.
    """
    getters, places = {}, {}
    layers = [name.removesuffix(".scales") for name in state if name.endswith(".scales")]
    taken = {f"{layer}.{part}" for layer in layers for part in ("weight", "scales", "biases")}
    for name in state:
        if name not in taken:
            getters[name], places[name] = state.getter(name), state.place(name)
    for layer in layers:
        absent = [part for part in ("weight", "biases") if f"{layer}.{part}" not in state]
        how = _grouping(quantization, layer)
        if absent:
            raise CheckpointError(f"{state.place(f'{layer}.scales')} stands without {layer}.{absent[0]}")
        name = f"{layer}.weight"
        getters[name], places[name] = _weight(_parts(state, layer), how, state.place(name)), state.place(name)
        with only_shapes():
            getters[name]()  # checks that they belong together
    return LazyState(getters, places, state.expected)


def _parts(state: LazyState, layer: str) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    return lambda: (state[f"{layer}.weight"], state[f"{layer}.scales"], state[f"{layer}.biases"])
