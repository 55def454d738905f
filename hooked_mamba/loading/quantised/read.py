"""Which reader a quantised checkpoint needs, by its config; and what no reader left as a plain weight is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hooked_mamba.loading.quantised import awq, bitsandbytes, compressed, gptq, scaled
from hooked_mamba.loading.tables import CheckpointError, LazyState

PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

READERS: dict[str, Callable[[Mapping[str, Any], LazyState], LazyState]] = {
    "bitsandbytes": bitsandbytes.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed.read,
    "fp8": scaled.read_fp8,
    "fbgemm_fp8": scaled.read_fp8,
    "modelopt": scaled.read_fp8,
}
"""quant_method of a config -> what reads it."""

MARKS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
}
"""Ends of keys that packed weights have."""

WAY_OUT = (
    "load the checkpoint that it was made from, or take it back with transformers"
    " (AutoModelForCausalLM.from_pretrained(...).dequantize()) and give the model to from_hf"
)


def dequantised(config: Mapping[str, Any], weights: LazyState) -> LazyState:
    """A checkpoint's weights in floating point, whatever its config says that they are packed as.

    Each is made when it is asked for, in float32, so that the peak of memory is one copy of the result.

    Raises
    ------
    CheckpointError
        A way of packing that is not read here, float8 without scales, or parts that are missing or do not fit.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    settings: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    dtypes = {name: weights[name].dtype for name in weights}
    packed = [name for name in weights if name.endswith(tuple(MARKS)) or _is_packed(dtypes[name], bool(given))]
    if not packed:
        return weights
    place = weights.place(packed[0])
    kind = str(dtypes[packed[0]]).removeprefix("torch.")
    method = str(settings.get("quant_method", "an unnamed method"))
    if not given:
        mark = next((how for end, how in MARKS.items() if packed[0].endswith(end)), None)
        what = f"is {kind} without scales" if mark is None else f"is of weights quantised by {mark}"
        raise CheckpointError(f"{place} {what}, and config.json has no quantization_config that says how: {WAY_OUT}")
    if method not in READERS:
        raise CheckpointError(
            f"the weights of this checkpoint are quantised by {method} ({place} is {kind}), which is not read here;"
            f" read are {', '.join(READERS)}: {WAY_OUT}"
        )
    state = READERS[method](settings, weights)
    left = next((name for name in packed if name in state and state.getter(name) == weights.getter(name)), None)
    if left is not None:
        kind = str(dtypes[left]).removeprefix("torch.")
        raise CheckpointError(
            f"{weights.place(left)} is {kind}, and nothing beside it says what it stands for in a checkpoint of"
            f" {method}: {WAY_OUT}"
        )
    return state


def _is_packed(dtype: torch.dtype, by_config: bool) -> bool:
    """Whether a tensor is no plain weight; integers of which no config speaks are refused when weights are assigned."""
    return dtype not in PLAIN if by_config else dtype.is_floating_point and dtype not in PLAIN
