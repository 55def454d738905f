"""Knockout in attention: zeros in the pattern keep chosen targets from reading the values of chosen sources.

With zeros alone only the value path is cut: all other entries stay as they are. `renormalise=True` rescales what is
left of each row to sum to 1, as if the scores had been masked (Geva et al. 2023, arXiv:2304.14767).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.analysis.captured import layer_list
from hooked_mamba.analysis.columns import Columns, column_mask, columns_before, kept


@contextmanager
def attention_knockout(
    model: Any,
    sources: Columns,
    targets: Columns = None,
    layers: int | Iterable[int] | None = None,
    heads: int | Sequence[int] | None = None,
    renormalise: bool = False,
) -> Iterator[Any]:
    """Cut what attention moves from sources to targets in every forward pass inside the `with`, also in `generate`.

    Parameters
    ----------
    sources, targets
        As in :func:`~hooked_mamba.analysis.knockout.knockout`.
    layers
        None: all layers with attention.
    heads
        Query heads; None: all.
    renormalise
        Whether to rescale each row to sum to 1; a row that has lost everything stays 0.

    Raises
    ------
    ValueError
        A layer without attention.
    """
    having = [i for i in layer_list(model, layers) if "attn" in model.block(i).branches]
    if layers is not None and having != layer_list(model, layers):
        raise ValueError(f"of the layers {layer_list(model, layers)} only {having} have attention")
    sources, targets = kept(sources), kept(targets)
    past: dict[int, Tensor] = {}

    def lose(pattern: Tensor, hook: Any) -> Tensor:
        b, n_heads, l, m = pattern.shape
        before, i = columns_before(model), hook.layer()

        def mask(columns: Columns) -> Tensor:
            found = column_mask(columns, b, l, before, pattern.device)
            return pattern.new_ones(b, l, dtype=torch.bool) if found is None else found

        known = torch.cat([past[i], mask(sources)], 1) if before and i in past else mask(sources)
        if before is not None:  # sources of earlier calls stay cut
            past[i] = known
        keys = torch.nn.functional.pad(known, (m - known.shape[1], 0))
        gone = mask(targets)[:, None, :, None] & keys[:, None, None, :]
        if heads is not None:
            mine = torch.zeros(n_heads, dtype=torch.bool, device=pattern.device)
            mine[heads if isinstance(heads, int) else list(heads)] = True
            gone = gone & mine[:, None, None]
        cut = pattern.masked_fill(gone, 0)
        if not renormalise:
            return cut
        total = cut.sum(-1, keepdim=True)
        return torch.where(total > 0, cut / torch.where(total > 0, total, 1), 0)

    with model.hooks([(f"blocks.{i}.attn.hook_pattern", lose) for i in having]):
        yield model
