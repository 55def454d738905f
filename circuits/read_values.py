"""What a coder reads of a run: a site's value, or a window of the values of several positions side by side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.frozen.run import Run
from saes.config import CoderConfig
from saes.windows import Beginnings, windows


def read_by(cfg: CoderConfig, run: Run) -> Float[Tensor, "b l d_in"]:
    """At all positions. Where the run continues from a memory, a window has zeros before its first position."""
    x = run.value_at(cfg.in_site)
    return x if cfg.window == 1 else windows(x, cfg.window, Beginnings(run.padding))[0]


def columns_read(cfg: CoderConfig, run: Run, row: int, position: int) -> slice:
    """The columns of one row that a coder reads at a position, the last of them its own."""
    first = 0 if run.padding is None else int(run.padding.left[row])
    return slice(min(position, max(first, position - cfg.window + 1)), position + 1)


def read_at(cfg: CoderConfig, run: Run, row: int, position: int) -> Float[Tensor, " d_in"]:
    """At one position of one row."""
    x = run.value_at(cfg.in_site)[row, columns_read(cfg, run, row, position)].flatten()
    width = cfg.d_in // cfg.window
    return torch.cat([x.new_zeros(cfg.window * width - len(x)), x])


def push_window(cfg: CoderConfig, run: Run, change: Float[Tensor, "n l d"], rows: Tensor) -> Float[Tensor, "n l d_in"]:
    """A change of the site's values as one of what is read."""
    if cfg.window == 1:
        return change
    return windows(_real(run, change, rows), cfg.window)[0]


def pull_window(cfg: CoderConfig, run: Run, V: Float[Tensor, "n l d_in"], rows: Tensor) -> Float[Tensor, "n l d"]:
    """Covectors on what is read as ones on the site's values."""
    if cfg.window == 1:
        return V
    below = torch.zeros_like(V[..., : V.shape[-1] // cfg.window])
    for k, part in enumerate(reversed(V.chunk(cfg.window, -1))):  # what was read k positions before
        below[:, : max(0, V.shape[1] - k)] += part[:, k:]
    return _real(run, below, rows)


def _real(run: Run, x: Tensor, rows: Tensor) -> Tensor:
    return x if run.mask is None else x * run.mask[rows].unsqueeze(-1)
