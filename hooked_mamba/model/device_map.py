"""One model on several devices: which block goes where, planned before anything is moved.

The parts are "embed", "blocks.0", "blocks.1", ..., "ln_final" and "unembed". A pass moves the residual stream, the
padding and carried values from block to block; every block's hooks and state live on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hooked_mamba.display import Shown
from hooked_mamba.loading.weights import float32_names, target_dtype
from hooked_mamba.memory import available_bytes

Devices = Mapping[str, int]
"""Device -> bytes that may be used on it, in the order in which they are filled."""

DeviceMap = str | Mapping[str, Any]
""""auto", or part -> device; "blocks.3" holds for all that is below it, "" for everything else."""


@dataclass(frozen=True)
class DevicePlan(Shown):
    """The device of every part."""

    places: Mapping[str, str]
    """Part -> device."""
    nbytes: Mapping[str, int]
    """Part -> bytes of its weights; what parts share counts where it comes first."""

    def on(self, device: str) -> int:
        """Bytes of weights on one device."""
        return sum(self.nbytes[part] for part, where in self.places.items() if where == device)

    def device_of(self, name: str) -> str:
        """The device of a parameter of this full name."""
        return self.places[part_of(name)]

    def lines(self) -> list[str]:
        """One line per device: its parts and their size."""
        found = []
        for device in dict.fromkeys(self.places.values()):
            mine = [part for part, where in self.places.items() if where == device]
            found.append(f"{device}: {mine[0]} to {mine[-1]}, {len(mine)} parts, {self.on(device) / 2**30:.2f} GiB")
        return found


def part_of(name: str) -> str:
    """The part that a parameter belongs to: "blocks.3" of "blocks.3.attn.q_proj.weight"."""
    first, *rest = name.split(".")
    return f"blocks.{rest[0]}" if first == "blocks" else first


def part_sizes(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes of each part's weights in a dtype, in order of computation; a model on "meta" is enough."""
    float32 = float32_names(model)
    sizes = {part_of(name): 0 for name, _ in model.named_parameters(remove_duplicate=False)}
    order = [part for part in sizes if part.startswith("blocks.")]
    ends = [part for part in sizes if part not in order and part not in ("ln_final", "unembed")]
    sizes = dict.fromkeys([*ends, *order, "ln_final", "unembed"], 0)
    for name, p in model.named_parameters():
        sizes[part_of(name)] += p.numel() * target_dtype(name, dtype, float32).itemsize
    return sizes


def shared_parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of parts that share a parameter, and so must be on one device."""
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        part = part_of(name)
        if first.setdefault(id(p), part) != part:
            yield first[id(p)], part


def free_devices(reserve: float = 0.1) -> dict[str, int]:
    """Every GPU, then the CPU, with their free memory less a reserve for activations."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    found = {name: available_bytes(torch.device(name)) for name in names}
    return {name: int((1 - reserve) * free) for name, free in found.items() if free is not None}


def plan(
    model: nn.Module,
    device_map: DeviceMap = "auto",
    dtype: torch.dtype = torch.float32,
    devices: Devices | None = None,
) -> DevicePlan:
    """Where every part of a model goes.

    Parameters
    ----------
    model
        Its weights may be on "meta": only shapes are read.
    device_map
        "auto": devices are filled one after the other, parts in order of computation. Or part -> device.
    dtype
        What the weights will be stored in.
    devices
        Free bytes of each for "auto"; None: what this machine has.

    Raises
    ------
    MemoryError
        "auto" finds no room; the error says what fits where and how much is missing.
    ValueError
        The mapping names an unknown part, leaves a part without a device, or puts parts that share a parameter on two
        devices.
    """
    sizes = part_sizes(model, dtype)
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(f"device_map must be 'auto' or a mapping from parts to devices, got {device_map!r}")
        places = _filled(sizes, free_devices() if devices is None else devices, dict(shared_parts(model)))
    else:
        places = _named(sizes, device_map)
    for a, b in shared_parts(model):
        if places[a] != places[b]:
            raise ValueError(f"{a} and {b} share weights: both must be on one device, not {places[a]} and {places[b]}")
    return DevicePlan(places, sizes)


def _filled(sizes: Mapping[str, int], devices: Devices, shared: Mapping[str, str]) -> dict[str, str]:
    """One device after the other; of two parts that share weights the second follows the first."""
    follows = {later: first for first, later in shared.items()}
    places: dict[str, str] = {}
    left = dict(devices)
    names = iter(devices)
    device = next(names, None)
    for part, size in sizes.items():
        if part in follows and follows[part] in places:
            places[part] = places[follows[part]]
            left[places[part]] -= size
            continue
        while device is not None and left[device] < size:
            device = next(names, None)
        if device is None:
            missing = sum(n for other, n in sizes.items() if other not in places)
            total = sum(sizes.values())
            held = ", ".join(f"{name} with {free / 2**30:.1f} GiB" for name, free in devices.items()) or "no device"
            raise MemoryError(
                f"the weights take {total / 2**30:.1f} GiB and there is {held}: everything before {part} fits, the"
                f" other {missing / 2**30:.1f} GiB do not; use a smaller dtype or more devices"
            )
        places[part] = device
        left[device] -= size
    return places


def _named(sizes: Mapping[str, int], device_map: Mapping[str, Any]) -> dict[str, str]:
    unknown = [part for part in device_map if part not in ("", "blocks", *sizes)]
    if unknown:
        raise ValueError(f"no part is named {', '.join(unknown)}; there are {', '.join(sizes)}")
    places = {}
    for part in sizes:
        found = [device_map[key] for key in (part, part.partition(".")[0], "") if key in device_map]
        if not found:
            raise ValueError(f"device_map has no entry for {part}; name it, or '' for everything else")
        places[part] = str(torch.device(found[0]))
    return places


def spread(model: nn.Module, planned: DevicePlan) -> None:
    """Move every part to its device, in place."""
    for part, device in planned.places.items():
        model.get_submodule(part).to(device)


def placed(planned: DevicePlan | None, device: Any) -> Callable[[str], Any]:
    """Parameter -> device."""
    return (lambda name: device) if planned is None else planned.device_of
