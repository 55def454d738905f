"""Where a stream lies in a model: the one place that checks that it exists and works out its width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hooked_mamba.models import HookedModel
from saes.targets import LOCAL, sites_of, window_of


@dataclass(frozen=True)
class Located:
    """A stream of one model."""

    sites: tuple[str, ...]
    """The hook sites that it is formed from."""
    width: int
    """Numbers at each position."""


def locate(stream: str, model: HookedModel, channels: Sequence[int] | None = None) -> Located:
    """Find a stream in a model.

    Parameters
    ----------
    stream
        Its name, see `saes.targets`.
    channels
        Entries of the first axis after the positions that are kept; None: all.

    Raises
    ------
    HookNameError
        If the model has no such site.
    ValueError
        If the site holds no number for every position, or has no local part.
    IndexError
        If a channel is out of range.
    """
    sites = tuple(sites_of(stream, model))
    site, window = window_of(stream)
    first, *rest = model.site(site.removesuffix(LOCAL)).shape(1, 1)[2:]
    for channel in channels or ():
        if not 0 <= channel < first:
            raise IndexError(f"channel {channel} of {stream} is out of range: it has {first}, 0 to {first - 1}")
    return Located(sites, math.prod([window, first if channels is None else len(channels), *rest]))
