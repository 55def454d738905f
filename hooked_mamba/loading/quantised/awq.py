"""AWQ (arXiv:2306.00978) in AutoAWQ's "gemm" layout: 4-bit integers with a scale and a zero for each group of inputs.

    W[o, i] = scales[i / group, o] (q[i, o] - z[i / group, o])

Both `qweight` and `qzeros` pack eight outputs in a word, in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.quantised.packed import Packed, setting, unpack, whole
from hooked_mamba.loading.tables import LazyState

PARTS = ("qweight", "qzeros", "scales")
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output of a word -> its place there."""


def read(settings: Mapping[str, Any], weights: LazyState) -> LazyState:
    """The weights of an AWQ checkpoint.

    Raises
    ------
    CheckpointError
        Other bits or layouts, or a part that is missing or of another kind.
    """
    setting(settings, ["bits", "w_bit"], (4,))
    setting(settings, ["version", "format"], ("gemm", "GEMM"), default="gemm")
    setting(settings, ["zero_point"], (True,), default=True)
    size = whole(settings, ["group_size", "q_group_size"], default=128)
    packed = Packed(weights)
    for module in packed.modules("qweight"):
        keys = {part: f"{module}.{part}" for part in PARTS}
        packed.make(f"{module}.weight", keys["qweight"], keys.values(), _weight(packed, keys, size))
    return packed.state()


def _weight(packed: Packed, keys: Mapping[str, str], size: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        q = _in_order(packed.tensor(keys["qweight"], [torch.int32], (None, None)))
        into, out = q.shape
        group = into if size == -1 else size
        if into % group:
            raise packed.fault(keys["qweight"], f"has {into} inputs, no multiple of group_size={group}")
        scales = packed.scales(keys["scales"], (into // group, out))
        zeros = _in_order(packed.tensor(keys["qzeros"], [torch.int32], (into // group, out // 8)))
        return ((q.unflatten(0, (-1, group)) - zeros.unsqueeze(1)) * scales.unsqueeze(1)).flatten(0, 1).t()

    return make


def _in_order(words: Tensor) -> Tensor:
    return unpack(words, 4, 1).unflatten(1, (-1, 8))[:, :, list(PLACES)].flatten(1)
