"""Tensors that say they live on another device: what a test needs to see numbers made in the wrong place.

They hold ordinary tensors and call themselves "meta". As on an accelerator, an op that is given them together with an
ordinary tensor of one or more axes is an error, and none of them turns into an array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Their indices may be ordinary tensors, as on an accelerator."""
COPYING = ("aten::copy_", "aten::_to_copy")


class Elsewhere(Tensor):
    """A tensor on the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on another device is no array: copy it with .cpu()")

    def __bool__(self) -> bool:
        return bool(self.held)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = _tensors([*args, *kwargs.values()])
    mixed = any(isinstance(x, Elsewhere) for x in tensors)
    ordinary = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
    if name in INDEXING and isinstance(args[0], Elsewhere):
        ordinary = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim]
    if mixed and ordinary and name not in COPYING:
        raise RuntimeError(f"{name} is given tensors of two devices")
    if any(x.is_meta for x in ordinary):
        raise RuntimeError(f"{name} is given a tensor that holds nothing")
    asked = kwargs.get("device")
    there = mixed if asked is None else _is_elsewhere(asked)
    if name in ("aten::copy_", *INDEXING):
        there = isinstance(args[0], Elsewhere)
    here = {key: "cpu" if key == "device" and _is_elsewhere(value) else value for key, value in kwargs.items()}
    out = func(*_each(_held, args), **{key: _each(_held, value) for key, value in here.items()})
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    return _each(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out) if there else out


def _tensors(values: list[Any] | tuple[Any, ...]) -> list[Tensor]:
    """Those of nested lists: what an op is given is nested in nothing else."""
    found = []
    for x in values:
        found += [x] if isinstance(x, Tensor) else _tensors(x) if isinstance(x, list | tuple) else []
    return found


def _each(change: Callable[[Any], Any], x: Any) -> Any:
    return type(x)([_each(change, one) for one in x]) if isinstance(x, list | tuple) else change(x)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Tensors of lists and numbers, also those that index, which are filled before any op is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(
                torch.tensor(at, dtype=None if at else torch.long) if isinstance(at, list) else at for at in index
            )
            args = (args[0], index, *args[2:])
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and _is_elsewhere(kwargs.get("device")):
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def another_device() -> Iterator[None]:
    """Inside, "meta" is a device with numbers."""
    with _Made(), _Ops():
        yield


def moved(module: nn.Module) -> nn.Module:
    """A model or a coder, moved there in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
    return module
