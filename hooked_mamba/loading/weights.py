"""Strict assignment of weights to a module built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from hooked_mamba.loading.shapes import is_fresh, only_shapes
from hooked_mamba.loading.tables import CheckpointError, LazyState, some

__all__ = ["check_shapes", "float32_names", "load_into", "target_dtype"]

Shape = tuple[int, ...]

HALF = (torch.bfloat16, torch.float16)
ELEMENTS_AT_ONCE = 2**20


def float32_names(module: nn.Module) -> frozenset[str]:
    """Parameters that stay float32 in a half-precision model, by full name: what the modules' `keep_float32` lists."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in getattr(owner, "keep_float32", ())
    )


def target_dtype(name: str, dtype: torch.dtype, float32: Collection[str]) -> torch.dtype:
    """The dtype of the parameter `name` in a model of `dtype`, in which those of `float32` are never half precision."""
    return torch.float32 if name in float32 and dtype in HALF else dtype


def check_shapes(expected: Mapping[str, Shape], state_dict: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those expected.

    Raises
    ------
    CheckpointError
        Listing every missing, unexpected and misshaped weight.
    """
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state_dict]
    for name in state_dict:
        got = tuple(state_dict[name].shape)
        if name not in expected:
            faults.append(f"unexpected: {name} {got}")
        elif got != expected[name]:
            faults.append(f"shape: {name} got {got}, expected {expected[name]}")
    if faults:
        raise CheckpointError(f"the weights do not fit the config, {_counted(faults)}:\n  " + "\n  ".join(faults))


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | Callable[[str], torch.device | str] = "cpu",
) -> None:
    """Give every parameter of `module` its weight from `state_dict`, each as a copy of its own.

    1. Compare names and shapes; collect every fault.
    2. Copy tensor by tensor into the dtype wanted, looking for NaN and infinities.
    3. Raise one error that lists all faults, or assign; a module that fails is left as it was.

    Build the module on the meta device and pass a lazy state dict, and the peak of memory is one copy of the
    weights. Tied parameters (one parameter under two names) need one of their names.

    Parameters
    ----------
    module
        Its parameters are replaced; `requires_grad` is kept.
    state_dict
        Tensors by the module's own names.
    dtype
        dtype of the weights; None: each parameter's own. Those of :func:`float32_names` are float32 where this is a
        half precision.
    device
        Where the weights go; or a function that says so for each name.

    Raises
    ------
    CheckpointError
        Missing, unexpected, misshaped, non-floating or non-finite weights, all listed.
    """
    slots, float32 = _slots(module), float32_names(module)
    expected = {name: slot for slot in slots for name in slot.names}
    state = LazyState.of(state_dict)
    faults = [
        f"unexpected: {state.place(name)} {tuple(state_dict[name].shape)}"
        for name in state_dict
        if name not in expected
    ]
    sources: dict[str, _Slot] = {}
    missing: dict[str, list[_Slot]] = {}
    for slot in slots:
        present = [name for name in slot.names if name in state_dict]
        if not present:
            missing.setdefault(str(state.place(slot.names[0])), []).append(slot)
            continue
        try:
            with only_shapes():
                source = state_dict[present[0]]
        except CheckpointError as error:  # what it is made of does not fit together
            faults.append(f"shape: {error}{_meaning(state, present[0])}")
            continue
        where = state.place(present[0])
        if not source.dtype.is_floating_point:
            faults.append(f"dtype: {where} got {source.dtype} (quantised?), expected floating point")
        elif source.shape != slot.parameter.shape:
            shapes = f"got {tuple(source.shape)}, expected {tuple(slot.parameter.shape)}"
            faults.append(f"shape: {where} {shapes}{_meaning(state, present[0])}")
        else:
            sources[present[0]] = slot
    for due, parts in missing.items():
        here = " and ".join(f"{part.names[0]} {tuple(part.parameter.shape)}" for part in parts)
        shape = tuple(parts[0].parameter.shape)
        faults.append(
            f"missing: {due} {shape}" if due == parts[0].names[0] else f"missing: {due}, which is {here} here"
        )
    copies: dict[str, Tensor] = {}
    for name, slot in sources.items():
        source = state_dict[name]
        wanted = target_dtype(name, dtype or slot.parameter.dtype, float32)
        target = device(name) if callable(device) else device
        copy = source.detach().to(device=target, dtype=wanted, copy=not is_fresh(source)).contiguous()
        place = state.place(name)
        found = (
            [_not_finite(row, *pair) for row, *pair in zip(place.rows, source, copy, strict=True)] if place.rows else []
        )
        fault = None if place.rows else _not_finite(str(place), source, copy)
        faults += [one for one in (fault, *found) if one]
        if not faults:
            copies[name] = copy
        del source, copy
    if faults:
        faults = list(dict.fromkeys(faults))
        of = f" (of {some(state.files)})" if state.files else ""
        raise CheckpointError(
            f"the checkpoint{of} does not fit {type(module).__name__}, {_counted(faults)}:\n  " + "\n  ".join(faults)
        )
    for name, slot in sources.items():
        slot.assign(copies.pop(name))


def _meaning(state: LazyState, name: str) -> str:
    """What a tensor is called here, where its file calls it otherwise or has it in another shape."""
    place = state.place(name)
    if place.tensor == name:
        return ""
    return f", as {name} here" if place.changed else f", which is {name} here"


class _Slot:
    """One parameter and every place of the module where it sits."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.places: list[tuple[str, nn.Module, str]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.places]

    def assign(self, tensor: Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=self.parameter.requires_grad)
        for _, owner, attribute in self.places:
            setattr(owner, attribute, parameter)


def _slots(module: nn.Module) -> list[_Slot]:
    slots: dict[int, _Slot] = {}
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            slots.setdefault(id(parameter), _Slot(parameter)).places.append((name, owner, attribute))
    return list(slots.values())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.reshape(-1).split(ELEMENTS_AT_ONCE)


def _finite(tensor: Tensor) -> bool:
    """One pass without a mask: NaN spreads to the extremes, an infinity is one of them."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _not_finite(name: str, source: Tensor, copy: Tensor) -> str | None:
    """A line for the error when the copy holds NaN or an infinity, saying whether the conversion made it."""
    if copy.device.type == "meta":
        return f"no data: {name} is on the meta device"
    if _finite(copy):
        return None
    bad = sum(int((~block.isfinite()).sum()) for block in _blocks(copy))
    if copy.dtype != source.dtype and _finite(source):
        return f"overflow: {name} has {bad} values too large for {copy.dtype}"
    return f"not finite: {name} has {bad} NaN or infinite values of {copy.numel()}"


def _counted(faults: list[str]) -> str:
    return f"{len(faults)} fault{'s' * (len(faults) > 1)}"
