"""A run's values without keeping them: streams between blocks stay, the inside of a block is computed again when asked.

Of a model of 130m at 1,024 positions the sites that attribution reads take 945 MiB, the streams 75 MiB. A covector goes
down layer by layer, so the inside of one block at a time is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.model.hooked_model import HookedModel
from hooked_mamba.state import ModelState

WHOLE = 3 * 2**28
"""Bytes up to which a run keeps everything, unless it is told otherwise."""


class Layerwise(Mapping[str, Tensor]):
    """What a run had at its sites: those between blocks as they were, those of one block from running it again.

    The numbers are those of the run, bit for bit. No functions may sit on hook points: they would run again, too.

    Parameters
    ----------
    model
        As it ran.
    tokens
        The prompts.
    names
        Full names of the sites, by block; and of those outside of blocks, under None.
    attention_mask, initial_state
        As the run had them.
    """

    def __init__(
        self,
        model: HookedModel,
        tokens: Tensor,
        names: Mapping[int | None, Sequence[str]],
        attention_mask: Tensor | None,
        initial_state: ModelState | None,
    ) -> None:
        self.model, self.tokens, self.names = model, tokens, names
        self.attention_mask, self.initial_state = attention_mask, initial_state
        self.handed_on = model.handed_on()
        n = model.cfg.n_layers
        wanted = [*names[None], *(f"blocks.{i}.hook_resid_pre" for i in range(n)), *self.handed_on.values()]
        inside = [name for name in dict.fromkeys(wanted) if not name.startswith("ln_final.")]
        with torch.no_grad():
            _, cache = self._run(tokens, inside, stop_at_layer=n)
            self.kept = {name: cache[name] for name in inside}

            def keep(scale: Tensor, hook: HookPoint) -> None:
                self.kept[str(hook.name)] = scale

            with model.hooks([("ln_final.hook_scale", keep)]):
                model.ln_final(cache[f"blocks.{n - 1}.hook_resid_post"])
        self.block: int | None = None
        self._values: Mapping[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.kept, *(name for names in self.names.values() for name in names)]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.kept or any(name in names for names in self.names.values())

    def __getitem__(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        layer = SiteName.parse(name).layer
        if layer is None or name not in self.names[layer]:
            raise KeyError(name)
        if layer != self.block:
            self._values = {}  # before the next one is made
            self._values, self.block = self._inside(layer), layer
        return self._values[name]

    @torch.no_grad()
    def _inside(self, layer: int) -> Mapping[str, Tensor]:
        carry = {name: self.kept[site] for name, site in self.handed_on.items()}
        _, cache = self._run(
            self.kept[f"blocks.{layer}.hook_resid_pre"],
            [name for name in self.names[layer] if name not in self.kept],
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            tokens=self.tokens,
            **({"carry": carry} if carry and layer else {}),
        )
        return cache.cache_dict

    def _run(self, given: Tensor, names: list[str], **options: Any) -> tuple[Tensor, ActivationCache]:
        return self.model.run_with_cache(
            given, names_filter=names, attention_mask=self.attention_mask, initial_state=self.initial_state, **options
        )
