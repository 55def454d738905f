"""The beginning of a run: no position reads a later one, so a run up to a position is itself a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.frozen.layerwise import Layerwise


class Beginning(Mapping[str, Tensor]):
    """A run's cache, up to a position.

    Parameters
    ----------
    cache
        Of the whole run.
    length, stop
        Its positions, and how many of them are left.
    """

    def __init__(self, cache: ActivationCache | Beginning | Layerwise, length: int, stop: int) -> None:
        self.whole: ActivationCache | Beginning | Layerwise = cache
        self.model: Any = cache.model
        self.later = length - stop

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)

    def __contains__(self, name: object) -> bool:
        return name in self.whole

    def __getitem__(self, name: str) -> Tensor:
        value = self.whole[name]
        site = self.model.hook_dict[name].site
        for axis, symbol in enumerate(("b", "l") if site is None else site.row.shape.split()):
            if symbol in ("l", "m"):  # m: keys, those of earlier calls in front
                value = value.narrow(axis, 0, value.shape[axis] - self.later)
        return value
