"""Rewriting what a coder predicts in every forward pass: the mechanism of splicing, steering and ablation.

A coder reads x and predicts y, a stream of its own (see `saes.targets`). A rewrite is a function (x, y) -> y', and

    y a whole site         value' = y'
    y a local part         value' = value + (y' - y)

A coder that reads a window reads its own pass from where a text begins; in `generate` also what earlier calls read. A
pass that continues from an initial state is refused, since no memory holds what was read.

Padded positions stay as they are: some sites lie behind the point where a mixer makes padding zero, so that a number
written there would reach real positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.captured import Padded, captured, padding_under_way
from hooked_mamba.analysis.columns import Columns, column_mask, columns_before
from hooked_mamba.components import at_least_fp32
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.models import HookedModel
from saes.config import CoderConfig
from saes.targets import LOCAL, sites_of, stream_values, streams_of, window_of
from saes.windows import CarriedWindows


class Rewrite(NamedTuple):
    """One stream and how to rewrite it."""

    cfg: CoderConfig
    new: Callable[[Tensor, Tensor], Tensor | None]
    """(x, y), b l d_in and b l d_out, of the pass under way -> y', of any precision; None leaves all as it is."""
    streams: tuple[str, str] | None = None
    """What is read and what is predicted, where the caller knows (:func:`saes.naming.check_fits`); None: by `cfg`."""


@contextmanager
def rewritten(model: HookedModel, rewrites: Sequence[Rewrite], positions: Columns = None) -> Iterator[None]:
    """Rewrite streams in every forward pass inside the `with`; later layers see the changes of earlier ones.

    Parameters
    ----------
    rewrites
        Rewrites of one site run in the order given, each on the result of the one before.
    positions
        Columns to rewrite.
    """
    known = [(rewrite, rewrite.streams or streams_of(rewrite.cfg)) for rewrite in rewrites]
    needed = [site for _, streams in known for site in _inputs(model, *streams)]
    with ExitStack() as stack:
        cache = stack.enter_context(captured(model, dict.fromkeys(needed)))
        told = stack.enter_context(padding_under_way(model))
        hooks = [_hook(model, rewrite.new, *streams, cache, told, positions) for rewrite, streams in known]
        stack.enter_context(model.hooks(hooks))
        yield


def _inputs(model: HookedModel, x: str, y: str) -> list[str]:
    """Sites that a rewrite reads besides the one it changes."""
    return ([] if x == y else sites_of(x, model)) + (sites_of(y, model) if y.endswith(LOCAL) else [])


def _hook(
    model: HookedModel,
    rewrite: Callable[[Tensor, Tensor], Tensor | None],
    x_stream: str,
    y_stream: str,
    cache: ActivationCache,
    told: Padded,
    positions: Columns,
) -> tuple[str, Callable[..., Tensor | None]]:
    site = y_stream.removesuffix(LOCAL)
    read, window = window_of(x_stream)
    side_by_side = CarriedWindows(window)

    def edit(value: Tensor, hook: HookPoint) -> Tensor | None:
        whole = value.flatten(2)
        y = stream_values(y_stream, cache, model) if y_stream != site else whole
        x = y if x_stream == y_stream else stream_values(read, cache, model)
        if window > 1:
            x = side_by_side(x, told, columns_before(model), model.rows_move)
        new = rewrite(x, y)
        if new is None:
            return None
        if y_stream != site:
            new = at_least_fp32(whole) + (new - y)
        new = new.to(value.dtype)
        batch, length = value.shape[:2]
        mask = column_mask(positions, batch, length, columns_before(model), value.device, told.padding)
        if site.startswith("blocks.") and told.padding is not None:
            real = told.padding.mask
            mask = real if mask is None else mask & real
        return (new if mask is None else torch.where(mask.unsqueeze(2), new, whole)).reshape(value.shape)

    return site, edit
