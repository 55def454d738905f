"""Running many patches in few forward passes.

1. One pass over the corrupted prompts keeps the residual stream that enters every block.
2. Patches stand side by side: the prompts are repeated, one copy per patch, and each edits its own copy's rows only.
3. Each copy starts at the patched layer, since nothing before it can differ.
4. Patches at a known position also start close to it, from the state of the prompts just before it, which no patch has
changed.
5. Logits are computed where the metric reads them (see `read_positions`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.read_positions import Metric as Metric
from hooked_mamba.analysis.read_positions import Readout
from hooked_mamba.state import BlockState, Call, Padding

STARTS = 32
"""At how many positions of a prompt patches may start at the most; memory before each of them is kept."""

LONGER = 4
"""How many times as many rows a pass takes at the most that runs a part of the columns."""


@dataclass(frozen=True)
class Patch:
    """One edit of one site; `edit` may write into the value it gets, or return a new one."""

    site: str
    edit: Callable[..., Tensor | None]
    position: int | None = None
    """The first column that it changes: `edit(value, first)` then gets the columns from `first` on. None: any, and
    `edit(value)` gets all of them."""

    def start(self, n_layers: int) -> int | None:
        """The first block that is affected; n_layers: only the unembedding; None: everything from the tokens on."""
        if self.site.startswith("blocks."):
            return int(self.site.split(".")[1])
        return n_layers if self.site.startswith("ln_final.") or self.site == "hook_logits" else None


@torch.no_grad()
def run_patches(
    model: Any,
    tokens: Int[Tensor, "b l"],
    patches: Sequence[Patch],
    metric: Metric,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    progress: bool = True,
    description: str = "patching",
    positions: Sequence[int] | None = None,
) -> Tensor:
    """The metric after each patch alone, in order: a number for each, or a row if the metric returns one.

    Parameters
    ----------
    tokens
        The corrupted prompts.
    batch_size
        Rows of one forward pass over whole prompts; a pass over fewer columns takes more rows.
    positions
        Columns of the logits that the metric reads; None: found by :func:`read_positions`. Elsewhere the metric sees
        NaN.
    """
    if not patches:
        raise ValueError("there are no patches to run")
    b = tokens.shape[0]
    plain = not any(point.edited for point in model.hook_points())
    base = Base(model, tokens, attention_mask)
    wanted = None if positions is None else [t % tokens.shape[1] for t in positions]
    whole = None if plain else list(range(tokens.shape[1]))  # functions on the way may count positions
    read = wanted if whole is None else whole
    readout = Readout(model, metric, model.to_logits(base.entering[-1]), read, all_tokens=not plain)
    early = plain and attention_mask is None and model.causal
    firsts = _firsts(patches, len(patches) * b // batch_size, tokens.shape[1]) if early else [0]
    base.remember(firsts)
    results: dict[int, Tensor] = {}
    with tqdm(total=len(patches), disable=not progress, desc=description) as bar:
        for first, numbers in _batches(patches, base, firsts, batch_size):
            batch = [patches[i] for i in numbers]
            with model.hooks(_hooks(batch, b, first)):
                if batch[0].start(base.n_layers) == base.n_layers:
                    rows = base.entering[-1].repeat(len(batch), 1, 1)
                    logits = model(rows, start_at_layer=base.n_layers, attention_mask=base.mask(len(batch)))
                    found = [torch.as_tensor(metric(one)) for one in logits.split(b)]
                else:
                    starts = [patch.start(base.n_layers) for patch in batch]
                    found = readout(base.patched(starts, first, min(readout.later(first), default=0)), first)
            results |= dict(zip(numbers, found, strict=True))
            bar.update(len(batch))
    return torch.stack([results[i] for i in range(len(patches))])


class Base:
    """The run that patches change.

    Parameters
    ----------
    model, tokens, attention_mask
        As in :func:`run_patches`.
    """

    def __init__(self, model: Any, tokens: Int[Tensor, "b l"], attention_mask: Tensor | None) -> None:
        self.model, self.tokens, self.attention_mask = model, tokens.to(model.device), attention_mask
        self.n_layers: int = model.cfg.n_layers
        self.handed_on = model.handed_on()
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        names = ["blocks.*.hook_resid_pre", last, *self.handed_on.values()]
        run = {"names_filter": names, "attention_mask": attention_mask, "stop_at_layer": self.n_layers}
        _, cache = model.run_with_cache(tokens, **run)
        assert isinstance(cache, ActivationCache)
        self.entering = [cache["resid_pre", i] for i in range(self.n_layers)] + [cache[last]]
        """The residual stream entering every block, and what the final norm reads."""
        self.carry = {name: cache[site] for name, site in self.handed_on.items()}
        """What one layer leaves for later ones."""
        self.memories: dict[int, list[BlockState]] = {}
        """Column -> every layer's memory before it."""

    def remember(self, at: Sequence[int]) -> None:
        """Keep the memory before some columns (ascending), layer by layer, so that a layer's weights are read once."""
        columns = [slice(before, first) for before, first in pairwise([0, *(first for first in at if first)])]
        calls = [replace(self.call(1, some), read=1) for some in columns]  # the least: the memory is what is wanted
        self.memories = {some.stop: [] for some in columns}
        for layer in range(self.n_layers):
            state: BlockState | None = None
            for i, some in enumerate(columns):
                _, state, calls[i] = self.model.run_block(layer, self.entering[layer][:, some], state, calls[i])
                self.memories[some.stop].append(state)

    def mask(self, n: int) -> Tensor | None:
        """The mask of n copies."""
        return None if self.attention_mask is None else self.attention_mask.repeat(n, 1)

    def call(self, n: int, columns: slice, embedded: Tensor | None = None) -> Call:
        """What blocks are told that run some columns of n copies, whose embedding may have been edited."""
        tokens, mask = self.tokens[:, columns].repeat(n, 1), self.mask(n)
        carry = {name: value[:, columns].repeat(n, *(1,) * (value.ndim - 1)) for name, value in self.carry.items()}
        return Call(
            None if mask is None else Padding.from_mask(mask, tokens.shape, self.model.device),
            torch.full((len(tokens),), columns.start, device=tokens.device) if columns.start else None,
            dict(self.model.carried(carry, embedded, tokens) or {}),
        )

    def patched(self, starts: Sequence[int | None], first: int, reads: int) -> Float[Tensor, "n m d"]:
        """The last block's output of copies that start at their layers (ascending) and run from column `first` on.

        The hooks that edit the copies are on the model's hook points. Of the output only the columns from `reads` on
        need be there.
        """
        begin, n, columns = starts[0], 0, slice(first, None)
        stream = self.entering[begin or 0][:0, columns]
        if begin is None:  # all of them: they are edited before the first block
            n = len(starts)
            stream = self.model.embed_tokens(self.tokens[:, columns].repeat(n, 1))
            call = self.call(n, columns, stream)
        for layer in range(begin or 0, self.n_layers):
            if joining := starts.count(layer):
                more = self.entering[layer][:, columns].repeat(joining, 1, 1)
                stream, n = torch.cat([stream.to(more.device), more]), n + joining
                call = self.call(n, columns)
            if layer == self.n_layers - 1 and not self.model.hooked_inside(layer):
                call = replace(call, read=self.tokens.shape[1] - reads)
            stream, _, call = self.model.run_block(layer, stream, self.memory(first, n, layer), call)
        return stream

    def memory(self, first: int, n: int, layer: int) -> BlockState | None:
        """One layer's memory of n copies before a column."""
        if first not in self.memories:
            return None
        one_row = len(self.tokens) == 1

        def copies(part: Tensor) -> Tensor:
            return part.expand(n, *part.shape[1:]) if one_row else part.repeat(n, *(1,) * (part.ndim - 1))

        return self.memories[first][layer].map(copies)


def residuals(model: Any, tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The residual stream entering every block, and what the final norm reads."""
    return Base(model, tokens, attention_mask).entering


def _firsts(patches: Sequence[Patch], starts: int, length: int) -> list[int]:
    """The columns from which patches run: only a few, so that many patches share one."""
    step = -(-length // max(1, min(STARTS, starts)))
    return sorted({0, *(patch.position // step * step for patch in patches if patch.position is not None)})


def _batches(
    patches: Sequence[Patch], base: Base, firsts: Sequence[int], batch_size: int
) -> list[tuple[int, list[int]]]:
    """(first column, patches that run side by side), as indices of patches in the order of their layers."""
    n, (b, length) = base.n_layers, base.tokens.shape
    groups: dict[tuple[int | None, int], list[int]] = {}
    for i, patch in enumerate(patches):
        start = patch.start(n)
        # What a layer hands on differs between copies that run it and copies that join above it.
        apart = start if start in (None, n) or base.handed_on else -1
        whole = patch.position is None or start == n
        first = 0 if whole else firsts[bisect_right(firsts, patch.position or 0) - 1]
        groups.setdefault((apart, first), []).append(i)
    found = []
    for (_, first), group in groups.items():
        ordered = sorted(group, key=lambda i: patches[i].start(n) or 0)
        rows = batch_size * min(LONGER, length // (length - first))  # as many columns as whole prompts have
        at_once = max(1, rows // b)
        found += [(first, ordered[i : i + at_once]) for i in range(0, len(ordered), at_once)]
    return found


def _hooks(batch: Sequence[Patch], b: int, first: int) -> list[tuple[str, Callable[..., Any]]]:
    """One hook per site, editing the rows of the patches that name it."""
    places: dict[str, list[int]] = {}
    for i, patch in enumerate(batch):
        places.setdefault(patch.site, []).append(i)

    def hook_for(mine: list[int]) -> Callable[..., Tensor]:
        def edit(value: Tensor, hook: Any) -> Tensor:
            for i in mine:
                rows = value[i * b : (i + 1) * b]
                out = batch[i].edit(rows) if batch[i].position is None else batch[i].edit(rows, first)
                if out is not None and out is not rows:
                    value[i * b : (i + 1) * b] = out
            return value

        return edit

    return [(site, hook_for(mine)) for site, mine in places.items()]
