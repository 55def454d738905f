"""Reading sites while a forward pass is under way, for tools that edit a later site with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.config import SSMConfig
from hooked_mamba.documents import Documents
from hooked_mamba.hooks.points import Reader
from hooked_mamba.hooks.positions import PositionSelect
from hooked_mamba.hooks.root import HookedRoot
from hooked_mamba.model.stack import Stack
from hooked_mamba.state import BlockState, Call, Padding

Positions = int | Iterable[int] | Tensor | None
"""Columns: one, several, a mask b l of bools (its own columns for each row), or None for all. Negative ones count from
each row's own last real token."""


@contextmanager
def captured(model: HookedRoot, names: Iterable[str]) -> Iterator[ActivationCache]:
    """A cache that fills during each forward pass inside the `with`, attached to the pass's graph.

    Values are as all hooks left them, not copied.
    """
    cache = ActivationCache({}, model)

    def keeper(name: str):
        def keep(value: Tensor) -> None:
            cache.cache_dict[name] = value

        return keep

    points = model.hook_dict
    readers = [(points[name], Reader(keeper(name), PositionSelect())) for name in names]
    try:
        for point, reader in readers:
            point.readers.append(reader)
        yield cache
    finally:
        for point, reader in readers:
            point.readers.remove(reader)


class Padded:
    """What the pass under way was told of its rows."""

    padding: Padding | None = None
    """None where nothing is padded."""
    documents: Documents | None = None
    """None where each row is one; known from the first block on."""
    seen: Int[Tensor, " b"] | None = None
    """Real tokens of each row in earlier calls; None where there were none, or nobody counted."""
    memory: BlockState | None = None
    """What the block under way continues from; None where it starts."""

    @property
    def continues(self) -> bool:
        """Whether the pass continues from the memory of earlier calls."""
        seen, memory = self.seen, self.memory
        counted = seen is not None and bool(seen.any())
        return counted or (memory is not None and any(bool(part.any()) for part in memory))


@contextmanager
def padding_under_way(model: Stack) -> Iterator[Padded]:
    """What is padded in each forward pass inside the `with`, and what else the pass was told of its rows."""
    padded = Padded()

    def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = kwargs.get("call", args[2] if len(args) > 2 else None)
        call = Call() if call is None else call
        padded.padding, padded.documents, padded.seen = call.padding, call.documents, call.seen
        padded.memory = kwargs.get("state", args[1] if len(args) > 1 else None)

    def before_embedding(embed: nn.Module, args: tuple[Any, ...]) -> None:
        padded.padding = model.padding

    with ExitStack() as stack:
        stack.callback(model.embed.register_forward_pre_hook(before_embedding).remove)
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(before_block, with_kwargs=True).remove)
        yield padded


def position_mask(
    positions: Positions, batch: int, length: int, device: torch.device, padding: Padding | None = None
) -> Bool[Tensor, "b l"]:
    """Columns as a mask; negative ones count from the last real token of each row.

    Raises
    ------
    IndexError
        A column that does not exist, or more positions back than a padded row has real tokens.
    ValueError
        A mask of another shape.
    """
    if positions is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if (
            positions.shape[-1] != length
            or positions.ndim not in (1, 2)
            or positions.numel()
            not in (
                length,
                batch * length,
            )
        ):
            raise ValueError(f"a position mask must be [{batch}, {length}] or [{length}], got {list(positions.shape)}")
        return positions.to(device).expand(batch, length)
    if isinstance(positions, Tensor):
        positions = positions.reshape(-1).tolist()
    columns = [positions] if isinstance(positions, int) else [int(t) for t in positions]
    mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
    for t in columns:
        if not -length <= t < length:
            raise IndexError(f"position {t} is out of range for {length} positions")
        if t >= 0 or padding is None:
            mask[:, t] = True
            continue
        own = padding.ends + t
        if bool((own < padding.left).any()):
            row = int((own < padding.left).nonzero()[0])
            real = int(padding.ends[row] - padding.left[row])
            raise IndexError(f"position {t} is out of range for the {real} real tokens of row {row}")
        mask[torch.arange(batch, device=device), own] = True
    return mask


def layer_list(model: HookedRoot, layers: int | Iterable[int] | None) -> list[int]:
    """Layers as ascending non-negative ints; None: all."""
    n = cast(SSMConfig, model.cfg).n_layers
    chosen = range(n) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for i in chosen:
        if not -n <= i < n:
            raise IndexError(f"layer {i} is out of range for a model of {n} layers")
    return sorted({i % n for i in chosen})


def channel_list(model: HookedRoot, channels: int | Iterable[int] | None, layer: int = 0) -> tuple[int, ...] | None:
    """Channels of a mixer as non-negative ints; None: all."""
    if channels is None:
        return None
    E = cast(Stack, model).mixer(layer).width
    chosen = [channels] if isinstance(channels, int) else [int(e) for e in channels]
    for e in chosen:
        if not -E <= e < E:
            raise IndexError(f"channel {e} is out of range: a mixer of this model has {E}, 0 to {E - 1}")
    return tuple(dict.fromkeys(e % E for e in chosen))
