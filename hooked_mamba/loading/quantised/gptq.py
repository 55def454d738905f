"""GPTQ (arXiv:2210.17323) in AutoGPTQ's and GPTQModel's files: integers, a scale and a zero for each group of inputs.

    W[o, i] = scales[g, o] (q[i, o] - z[g, o]),    g = g_idx[i]

`qweight` packs inputs (32 / bits in a word), `qzeros` outputs. The older files ("gptq") store z - 1, "gptq_v2" z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.quantised.packed import Packed, setting, unpack, whole
from hooked_mamba.loading.tables import CheckpointError, LazyState

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read(settings: Mapping[str, Any], weights: LazyState) -> LazyState:
    """The weights of a GPTQ checkpoint.

    Raises
    ------
    CheckpointError
        Other bits or layouts, or a part that is missing or of another kind.
    """
    bits = setting(settings, ["bits"], (2, 4, 8))
    layout = setting(settings, ["checkpoint_format", "format"], ("gptq", "gptq_v2"), default="gptq")
    size = whole(settings, ["group_size"], default=128)
    rules = settings.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise CheckpointError(f"quantization_config in config.json has dynamic={rules!r}, expected rules by module")
    changed = [rule for rule in rules if not str(rule).startswith("-:")]
    if changed:
        raise CheckpointError(
            f"quantization_config in config.json packs some layers otherwise (dynamic: {changed[0]!r}), and one way for"
            " all is read here: load the checkpoint that it was made from"
        )
    packed = Packed(weights)
    for module in packed.modules("qweight"):
        keys = {part: f"{module}.{part}" for part in PARTS}
        make = _weight(packed, keys, bits, size, layout == "gptq")
        packed.make(f"{module}.weight", keys["qweight"], keys.values(), make)
    return packed.state()


def _weight(packed: Packed, keys: Mapping[str, str], bits: int, size: int, minus_one: bool) -> Callable[[], Tensor]:
    def make() -> Tensor:
        q = unpack(packed.tensor(keys["qweight"], [torch.int32], (None, None)), bits, 0)
        into, out = q.shape
        scales = packed.scales(keys["scales"], (None, out))
        groups = len(scales)
        words = packed.tensor(keys["qzeros"], [torch.int32], (groups, -(-out * bits // 32)))
        zeros = unpack(words, bits, 1)[:, :out]
        if minus_one and bool((zeros == 2**bits - 1).any()):
            raise packed.fault(
                keys["qzeros"],
                f"has a zero stored as {2**bits - 1}, which readers of this format take for 0 or for {2**bits}",
            )
        if packed.has(keys["g_idx"]):
            group = packed.tensor(keys["g_idx"], [torch.int32, torch.int64], (into,)).long()
        else:
            length = into if size == -1 else min(size, into)
            if groups != -(-into // length):
                raise packed.fault(keys["scales"], f"has {groups} rows for {into} inputs in groups of {length}")
            group = torch.arange(into) // length
        if bool((group < 0).any()) or bool((group >= groups).any()):
            where = keys["g_idx"] if packed.has(keys["g_idx"]) else keys["scales"]
            raise packed.fault(where, f"has groups up to {int(group.max())} for {groups} rows of scales")
        return (scales[group] * (q - (zeros + int(minus_one))[group])).t()

    return make
