"""Units of branches scaled in the real model: attention heads at a source, neurons, experts, channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from circuits.interventions.edits import ScaleUnit
from circuits.interventions.parts import factors
from hooked_mamba.analysis.captured import Padded, captured
from hooked_mamba.analysis.columns import columns_before
from hooked_mamba.frozen.places import branch_of, given_site, u_site
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.models import HookedModel


@contextmanager
def unit_hooks(model: HookedModel, edit: ScaleUnit, padded: Padded) -> Iterator[list[tuple[str, Any]]]:
    """The hooks of an edit, and what they look at in each pass."""
    layer, name = branch_of(edit.part)
    branches: Any = model.block(layer).branches
    given = name not in branches
    at, sizes = f"blocks.{layer}.{name}.", {} if given else branches[name].sizes()

    def shares(like: Tensor) -> Tensor:
        """The factor at each position of this call, b l."""
        return factors(edit.positions, edit.factor, like, columns_before(model), padded.padding)

    past: list[Tensor] = []

    def pattern(value: Tensor, hook: HookPoint) -> Tensor:
        b, _, l, m = value.shape
        here, before = shares(value.new_ones(b, l)), columns_before(model)
        whole = torch.cat([*past, here], 1) if before else here
        if before is not None:  # values of earlier calls stay scaled
            past[:] = [whole]
        keys = torch.nn.functional.pad(whole, (m - whole.shape[1], 0), value=1.0)
        new = value.clone()
        new[:, edit.index] *= keys[:, None]
        return new

    def weights(value: Tensor, hook: HookPoint) -> Tensor:
        mine = cache[f"{at}hook_expert_indices"] == edit.index
        return torch.where(mine, value * shares(value[..., 0]).unsqueeze(-1), value)

    def channel(value: Tensor, hook: HookPoint) -> Tensor:
        new = value.flatten(2).clone()
        new[..., slice(None) if given else slice(edit.index, edit.index + 1)] *= shares(new[..., 0]).unsqueeze(-1)
        return new.reshape(value.shape)

    if "Q" in sizes:
        yield [(f"{at}hook_pattern", pattern)]
    elif "X" in sizes:
        with captured(model, [f"{at}hook_expert_indices"]) as cache:
            yield [(f"{at}hook_expert_weights", weights)]
    else:
        yield [(given_site(model, layer, name) if given else f"{at}{u_site(branches[name])}", channel)]
