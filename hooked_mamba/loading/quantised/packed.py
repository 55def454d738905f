"""What all readers of packed weights share: finding the tensors of a weight, checking them, and unpacking integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.tables import CheckpointError, LazyState, Place

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Packed:
    """The tensors of a quantised checkpoint."""

    def __init__(self, weights: LazyState) -> None:
        self.weights = weights
        self._made: dict[str, tuple[Callable[[], Tensor], str]] = {}
        self._used: set[str] = set()
        self._last: tuple[str, Tensor] | None = None

    def fault(self, key: str, cause: str) -> CheckpointError:
        """An error that names key, file and cause."""
        return CheckpointError(f"{self.weights.place(key)} {cause}")

    def modules(self, mark: str) -> list[str]:
        """Modules that have a tensor of a name, such as "qweight"."""
        return [name.removesuffix(f".{mark}") for name in self.weights if name.endswith(f".{mark}")]

    def has(self, key: str) -> bool:
        """Whether there is such a tensor."""
        return key in self.weights

    def tensor(self, key: str, dtypes: Iterable[torch.dtype], shape: tuple[int | None, ...] | None = None) -> Tensor:
        """A tensor that must be there with one of some dtypes and a shape, in which None is any size.

        Raises
        ------
        CheckpointError
            It is missing, or of another kind.
        """
        if key not in self.weights:
            raise CheckpointError(f"{key} is missing: without it {key.rpartition('.')[0]} cannot be dequantised")
        found, dtypes = self.weights[key], tuple(dtypes)
        if found.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise self.fault(key, f"is {str(found.dtype).removeprefix('torch.')}, expected {expected}")
        if shape is not None:
            fits = len(shape) == found.ndim and all(s in (None, n) for s, n in zip(shape, found.shape, strict=True))
            if not fits:
                wanted = tuple("any" if s is None else s for s in shape)
                raise self.fault(key, f"has shape {tuple(found.shape)}, expected {wanted}")
        return found

    def scales(self, key: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """Finite floating-point numbers, in float32."""
        found = self.tensor(key, FLOATS, shape).float()
        if not bool(found.isfinite().all()):
            raise self.fault(key, "has numbers that are not finite")
        return found

    def make(self, name: str, source: str, parts: Iterable[str], make: Callable[[], Tensor]) -> None:
        """Put a weight in the place of the tensors that it is packed in; `source` is the one that errors name."""
        self._used |= {source, *parts}
        self._made[name] = lambda: self._latest(name, make), source

    def _latest(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A weight, which whoever loads asks for several times in a row: the last one is kept."""
        if self._last is None or self._last[0] != name:
            self._last = None  # one at a time
            self._last = name, make()
        return self._last[1]

    def drop(self, *keys: str) -> None:
        """Leave out tensors that shape no weight, such as scales of activations."""
        self._used |= set(keys)

    def state(self) -> LazyState:
        """All tensors, packed ones as the weights that they stand for."""
        kept = [name for name in self.weights if name not in self._used]
        getters = {name: self.weights.getter(name) for name in kept} | {n: make for n, (make, _) in self._made.items()}
        places = {name: self.weights.place(name) for name in kept}
        places |= {n: Place(source, self.weights.place(source).file, True) for n, (_, source) in self._made.items()}
        return LazyState(getters, places, self.weights.expected)


def unpack(words: Tensor, bits: int, axis: int) -> Tensor:
    """Unsigned integers of 2, 4 or 8 bits from 32-bit words along an axis, lowest bits first, as int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    spread = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    axis %= words.ndim
    return spread.movedim(-1, axis + 1).flatten(axis, axis + 1)


def setting(settings: Mapping[str, Any], names: Iterable[str], allowed: Iterable[Any], default: Any = None) -> Any:
    """A setting under the first of its names that is there.

    Raises
    ------
    CheckpointError
        A value that is not read here.
    """
    names, allowed = tuple(names), tuple(allowed)
    name = next((name for name in names if settings.get(name) is not None), None)
    value = default if name is None else settings[name]
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        expected = ", ".join(map(repr, allowed))
        raise CheckpointError(
            f"quantization_config in config.json has {name or names[0]}={value!r}, and only {expected} is read here:"
            " load the checkpoint that it was made from, or dequantise it with the library that wrote it"
        )
    return value


def whole(settings: Mapping[str, Any], names: Iterable[str], default: int | None = None) -> int:
    """A whole number above 0, or -1 for "all of it"."""
    names = tuple(names)
    value = next((settings[name] for name in names if settings.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise CheckpointError(f"quantization_config in config.json has {names[0]}={value!r}, expected a whole number")
    return value
