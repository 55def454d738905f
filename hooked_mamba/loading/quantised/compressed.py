"""compressed-tensors (vLLM's format): integers packed in words or alone, or float8, scaled by the config's strategy.

    W[i, j] = scale (q[i, j] - z),    scale and z of the weight, of row i, of its group j / group_size, or of a block

Packed integers are stored with 2^(bits - 1) added, lowest bits first. `config_groups` says for each set of layers how
they are packed; files name all that a layer needs, so one group's settings are enough where all agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.quantised.packed import Packed, unpack
from hooked_mamba.loading.quantised.scaled import FLOAT8, OF_ACTIVATIONS, times
from hooked_mamba.loading.tables import CheckpointError, LazyState

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", None)
PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def read(settings: Mapping[str, Any], weights: LazyState) -> LazyState:
    """The weights of a compressed-tensors checkpoint.

    Raises
    ------
    CheckpointError
        A format, bits or a strategy that is not read here, or a part that is missing or of another kind.
    """
    scheme = _scheme(settings)
    packed = Packed(weights)
    for module in packed.modules("weight_scale"):
        keys = {part: f"{module}.{part}" for part in PARTS}
        source = next((keys[part] for part in ("weight_packed", "weight") if packed.has(keys[part])), None)
        if source is None:
            raise packed.fault(keys["weight_scale"], f"has no {keys['weight_packed']} or {keys['weight']} beside it")
        packed.make(keys["weight"], source, keys.values(), _weight(packed, keys, scheme))
    packed.drop(*(name for name in weights if name.endswith((*OF_ACTIVATIONS, ".input_zero_point"))))
    return packed.state()


def _scheme(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are packed: bits, strategy and group size, the same in all groups."""
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(
        isinstance(g, Mapping) and isinstance(g.get("weights") or {}, Mapping) for g in groups.values()
    ):
        raise CheckpointError(f"quantization_config in config.json has config_groups={groups!r}, expected objects")
    for form in [settings.get("format"), *(group.get("format") for group in groups.values())]:
        if form not in FORMATS:
            raise CheckpointError(
                f"quantization_config in config.json has format={form!r} of compressed-tensors, and only"
                f" {', '.join(filter(None, FORMATS))} are read here: load the checkpoint that it was made from"
            )
    sparse = settings.get("sparsity_config") or {}
    if settings.get("transform_config") or not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        name = "transform_config" if settings.get("transform_config") else "sparsity_config"
        raise CheckpointError(
            f"quantization_config in config.json has a {name}, by which stored weights are turned or left out, and it"
            " is not read here: load the checkpoint that it was made from"
        )
    found = [dict(group.get("weights") or {}) for group in groups.values()]
    kept = [
        {name: one.get(name) for name in ("num_bits", "strategy", "group_size", "block_structure")} for one in found
    ]
    if any(one != kept[0] for one in kept):
        raise CheckpointError(
            f"quantization_config in config.json packs layers in {len(kept)} ways (config_groups), and one for all is"
            " read here: load the checkpoint that it was made from"
        )
    scheme = kept[0] if kept else {"num_bits": None, "strategy": None, "group_size": None, "block_structure": None}
    if scheme["strategy"] not in ("tensor", "channel", "group", "block", None):
        raise CheckpointError(
            f"quantization_config in config.json has strategy={scheme['strategy']!r} for weights, expected tensor,"
            " channel, group or block"
        )
    return scheme


def _weight(packed: Packed, keys: Mapping[str, str], scheme: Mapping[str, Any]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        if packed.has(keys["weight_packed"]):
            values, zeros = _unpacked(packed, keys, scheme["num_bits"])
        else:
            values = packed.tensor(keys["weight"], [torch.int8, *FLOAT8]).float()
            zeros = None
            if packed.has(keys["weight_zero_point"]):
                zeros = packed.tensor(keys["weight_zero_point"], [torch.int8, *FLOAT8]).float()
        if scheme["strategy"] == "block":
            if zeros is not None and bool((zeros != 0).any()):
                raise packed.fault(keys["weight_zero_point"], "has zeros of blocks, which are not read here")
            return times(packed, keys["weight"], values, keys["weight_scale"], scheme["block_structure"])
        return _grouped(packed, keys, values, zeros, scheme)

    return make


def _unpacked(packed: Packed, keys: Mapping[str, str], bits: Any) -> tuple[Tensor, Tensor | None]:
    """Integers from words of 32 bits, and their zeros, if there are."""
    if bits not in (2, 4, 8):
        raise packed.fault(
            keys["weight_packed"], f"has num_bits={bits!r} by config.json, and only 2, 4 or 8 are read here"
        )
    words = packed.tensor(keys["weight_packed"], [torch.int32], (None, None))
    shape = packed.tensor(keys["weight_shape"], [torch.int32, torch.int64], (2,)).tolist()
    if words.shape != (shape[0], -(-shape[1] * bits // 32)):
        raise packed.fault(
            keys["weight_packed"], f"has shape {tuple(words.shape)}, expected {(shape[0], -(-shape[1] * bits // 32))}"
        )
    half = 2 ** (bits - 1)
    values = (unpack(words, bits, 1)[:, : shape[1]] - half).float()
    if not packed.has(keys["weight_zero_point"]):
        return values, None
    columns = packed.scales(keys["weight_scale"]).shape[-1]
    words = packed.tensor(keys["weight_zero_point"], [torch.int32], (-(-shape[0] * bits // 32), columns))
    return values, (unpack(words, bits, 0)[: shape[0]] - half).float()


def _grouped(
    packed: Packed, keys: Mapping[str, str], values: Tensor, zeros: Tensor | None, scheme: Mapping[str, Any]
) -> Tensor:
    """scale (q - z), one a weight, a row, or a group of a row's inputs."""
    scales = packed.scales(keys["weight_scale"])
    if scales.numel() == 1:
        return (values if zeros is None else values - zeros.reshape(())) * scales.reshape(())
    scales = scales.reshape(-1, 1) if scales.ndim == 1 else scales
    rows, into = values.shape
    groups = scales.shape[-1]
    if scales.shape[0] != rows or into % groups:
        raise packed.fault(
            keys["weight_scale"], f"has shape {tuple(scales.shape)}, expected {rows} rows of groups that divide {into}"
        )
    size = {"group": scheme["group_size"], "channel": into}.get(scheme["strategy"])
    if size is not None and size * groups != into:
        raise packed.fault(
            keys["weight_scale"],
            f"has {groups} groups of {into} inputs, and config.json says strategy={scheme['strategy']!r} with"
            f" group_size={scheme['group_size']!r}",
        )
    group = torch.arange(into) // (into // groups)
    if packed.has(keys["weight_g_idx"]):
        given = packed.tensor(keys["weight_g_idx"], [torch.int32, torch.int64], (into,)).long()
        if not bool((given == -1).all()):  # what the library writes where the order is the usual one
            group = given
    if bool((group < 0).any()) or bool((group >= groups).any()):
        raise packed.fault(keys["weight_g_idx"], f"has groups outside of 0 to {groups - 1}")
    if zeros is not None:
        values = values - zeros.reshape(scales.shape)[:, group]
    return values * scales[:, group]
