"""bitsandbytes: 8-bit integers with a scale for each row (LLM.int8(), arXiv:2208.07339), and 4-bit codes with a scale
for each block (QLoRA, arXiv:2305.14314), whose scales may be 8-bit codes themselves (double quantisation).

    8 bits    W[i, j] = SCB[i] / 127 int8[i, j]
    4 bits    W[n] = absmax[n / blocksize] map[code[n]]        n counts entries in order, the high half of a byte first
    double    absmax[b] = nested_absmax[b / nested_blocksize] nested_map[code[b]] + offset

Everything that shapes a 4-bit weight stands beside it: its two tables, and a JSON text in a tensor of bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.quantised.packed import Packed
from hooked_mamba.loading.tables import LazyState

STATE = ".quant_state.bitsandbytes__"
ROW_SCALE = 7.874015718698502e-3
"""1 / 127, as the library writes it."""


def read(settings: Mapping[str, Any], weights: LazyState) -> LazyState:
    """The weights of a checkpoint that bitsandbytes packed, whichever way each is.

    Raises
    ------
    CheckpointError
        A part that is missing, or of another kind.
    """
    packed = Packed(weights)
    for key in [name for name in weights if STATE in name]:
        name, kind = key.split(STATE)
        parts = {end: f"{name}.{end}" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
        packed.make(name, name, [key, *parts.values()], _four_bits(packed, name, key, parts, kind))
    for module in packed.modules("SCB"):
        name, scale, layout = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
        packed.make(name, name, [scale, layout], _eight_bits(packed, name, scale, layout))
    for name in weights:  # what a cut file lacks is said when it is read
        if name.endswith(".absmax") and not any(other.startswith(name[:-7] + STATE) for other in weights):
            raise packed.fault(name, f"has no {name[:-7]}{STATE}nf4 or {STATE}fp4 beside it, which says its shape")
    return packed.state()


def _eight_bits(packed: Packed, name: str, scale: str, layout: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        codes = packed.tensor(name, [torch.int8], (None, None))
        if packed.has(layout) and int(packed.tensor(layout, [torch.uint8])) != 0:
            raise packed.fault(layout, "is not 0: its rows are in an order for one kind of GPU, and not in turn")
        return codes.float() * packed.scales(scale, (codes.shape[0],)).view(-1, 1) * ROW_SCALE

    return make


def _four_bits(packed: Packed, name: str, key: str, parts: Mapping[str, str], kind: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        about = _about(packed, key, kind)
        shape, block = about["shape"], about["blocksize"]
        count = math.prod(shape)
        stored = packed.tensor(name, [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
        bytes_ = stored.reshape(-1).view(torch.uint8)
        if len(bytes_) != (count + 1) // 2:
            raise packed.fault(name, f"has {len(bytes_)} bytes, expected {(count + 1) // 2} for {shape}")
        codes = torch.stack((bytes_ >> 4, bytes_ & 0xF), 1).flatten()[:count]
        table = packed.scales(parts["quant_map"], (16,))
        return _blocks(table[codes.int()], _absmax(packed, parts, about, -(-count // block)), block).reshape(shape)

    return make


def _absmax(packed: Packed, parts: Mapping[str, str], about: Mapping[str, Any], blocks: int) -> Tensor:
    """The scale of every block."""
    if "nested_blocksize" not in about:
        return packed.scales(parts["absmax"], (blocks,))
    codes = packed.tensor(parts["absmax"], [torch.uint8], (blocks,))
    table = packed.scales(parts["nested_quant_map"], (256,))
    size = about["nested_blocksize"]
    outer = packed.scales(parts["nested_absmax"], (-(-blocks // size),))
    return _blocks(table[codes.int()], outer, size) + about["nested_offset"]


def _blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Values times the scale of their block; the last one may be short."""
    return values * scales.repeat_interleave(min(size, len(values)))[: len(values)]


def _about(packed: Packed, key: str, kind: str) -> dict[str, Any]:
    """What the JSON text says."""
    text = packed.tensor(key, [torch.uint8], (None,))
    try:
        about = json.loads(bytes(text.tolist()).decode())
        shape, block = about["shape"], about["blocksize"]
        nested = {n: about[n] for n in ("nested_blocksize", "nested_offset")} if "nested_blocksize" in about else {}
        sizes = [*shape, block, *([nested["nested_blocksize"]] if nested else [])]
        right = all(isinstance(n, int) and n > 0 for n in sizes) and math.isfinite(nested.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise packed.fault(key, f"does not say how its weight is packed: {type(error).__name__} {error}") from None
    if not right or about.get("quant_type") != kind:
        raise packed.fault(key, f"says {about}, which is no packing of {kind}")
    return {"shape": tuple(shape), "blocksize": block, **nested}
