"""Numbers times scales: float8 with one scale for all of a weight, for each row or for each block of it.

    W[i, j] = scale[i / b0, j / b1] W8[i, j]

transformers' and DeepSeek's fine-grained fp8 calls the scale `weight_scale_inv` (it multiplies, in spite of its name),
FBGEMM, NVIDIA's ModelOpt and compressed-tensors `weight_scale`. Scales of activations shape no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.quantised.packed import Packed, setting
from hooked_mamba.loading.tables import LazyState

FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))
ENDS = ("_scale_inv", "_scale")
OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".input_scale_ub", ".output_scale")


def read_fp8(settings: Mapping[str, Any], weights: LazyState) -> LazyState:
    """The weights of a checkpoint in float8.

    Raises
    ------
    CheckpointError
        A weight without scales, or scales that do not fit it.
    """
    setting(settings, ["quant_algo"], ("FP8", None), default=None)
    block = settings.get("weight_block_size")
    packed = Packed(weights)
    for name in [name for name in weights if weights[name].dtype in FLOAT8]:
        scale = next((name + end for end in ENDS if packed.has(name + end)), None)
        if scale is None:
            raise packed.fault(
                name,
                f"is {str(weights[name].dtype).removeprefix('torch.')} without a scale beside it ({name}_scale_inv)",
            )
        packed.make(name, name, [scale], _weight(packed, name, scale, block))
    packed.drop(*(name for name in weights if name.endswith(OF_ACTIVATIONS)))
    return packed.state()


def _weight(packed: Packed, name: str, scale: str, block: Any) -> Callable[[], Tensor]:
    def make() -> Tensor:
        return times(packed, name, packed.tensor(name, FLOAT8).float(), scale, block)

    return make


def times(packed: Packed, name: str, values: Tensor, scale: str, block: Any = None) -> Tensor:
    """Values times their scales: a number, one for each row, or one for each block of the last two axes.

    Raises
    ------
    CheckpointError
        Scales of another shape.
    """
    scales = packed.scales(scale)
    if scales.numel() == 1:
        return values * scales.reshape(())
    if block is not None:
        lengths = _lengths(packed, scale, block, values)
        sizes = [-(-n // length) for n, length in zip(values.shape[-2:], lengths, strict=True)]
        if tuple(scales.shape) != (*values.shape[:-2], *sizes):
            raise packed.fault(
                scale, f"has shape {tuple(scales.shape)}, expected {(*values.shape[:-2], *sizes)} for blocks of {block}"
            )
        wide = scales.repeat_interleave(lengths[0], -2).repeat_interleave(lengths[1], -1)
        return values * wide[..., : values.shape[-2], : values.shape[-1]]
    if scales.shape[0] != values.shape[0] or scales.numel() != values.shape[0]:
        raise packed.fault(scale, f"has shape {tuple(scales.shape)}, expected one scale, or one a row of {name}")
    return values * scales.reshape(-1, *[1] * (values.ndim - 1))


def _lengths(packed: Packed, scale: str, block: Any, values: Tensor) -> list[int]:
    """The axes of a block, as far as the weight goes.

    Raises
    ------
    CheckpointError
        Not two positive whole numbers.
    """
    right = isinstance(block, list) and len(block) == 2 and values.ndim >= 2
    if not right or not all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in block):
        raise packed.fault(scale, f"is of blocks of {block!r} by config.json, expected two whole numbers")
    return [min(b, n) for b, n in zip(block, values.shape[-2:], strict=True)]
