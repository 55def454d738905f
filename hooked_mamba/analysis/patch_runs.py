"""Running many patches in few forward passes.

1. One pass over the corrupted prompts keeps the residual stream that enters every block.
2. Patches of the same layer stand side by side: the prompts are repeated, one copy a patch, and each patch edits its
   own copy's rows only.
3. Such a batch starts at the patched layer, since nothing before it can differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.activation_cache import ActivationCache

Metric = Callable[[Tensor], Tensor]
"""From logits b l V to one number, or to one a row."""


@dataclass(frozen=True)
class Patch:
    """One edit of one site; `edit` may write into the value that it gets, or return another."""

    site: str
    edit: Callable[[Tensor], Tensor | None]

    def start(self, n_layers: int) -> int | None:
        """The first block that can notice; n_layers: only the unembedding; None: from the tokens on."""
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
) -> Tensor:
    """The metric after each patch alone, in order: one number each, or a row of them where the metric gives one.

    Parameters
    ----------
    tokens
        The corrupted prompts.
    batch_size
        Rows of one forward pass.
    """
    b = tokens.shape[0]
    entering = residuals(model, tokens, attention_mask)
    results: list[Tensor] = []
    with tqdm(total=len(patches), disable=not progress, desc=description) as bar:
        for start, batch in _batches(patches, model.cfg.n_layers, max(1, batch_size // b)):
            n = len(batch)
            rows = tokens if start is None else entering[start]
            rows = rows.repeat(n, *(1,) * (rows.ndim - 1))
            mask = None if attention_mask is None else attention_mask.repeat(n, 1)
            with model.hooks(_hooks(batch, b)):
                behind = None if start is None else tokens.repeat(n, 1)
                logits = model(rows, start_at_layer=start, attention_mask=mask, tokens=behind)
            results += [torch.as_tensor(metric(one)) for one in logits.split(b)]
            bar.update(n)
    if not results:
        raise ValueError("there are no patches to run")
    return torch.stack(results)


def residuals(model: Any, tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The residual stream entering every block, and what the final norm reads."""
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    _, cache = model.run_with_cache(
        tokens, attention_mask=attention_mask, names_filter=["blocks.*.hook_resid_pre", last], return_type=None
    )
    assert isinstance(cache, ActivationCache)
    return [cache["resid_pre", i] for i in range(model.cfg.n_layers)] + [cache[last]]


def _batches(patches: Sequence[Patch], n_layers: int, at_once: int) -> Iterator[tuple[int | None, list[Patch]]]:
    for start, group in groupby(patches, key=lambda patch: patch.start(n_layers)):
        same = list(group)
        for first in range(0, len(same), at_once):
            yield start, same[first : first + at_once]


def _hooks(batch: Sequence[Patch], b: int) -> list[tuple[str, Callable[..., Any]]]:
    """One hook a site, editing the rows of the patches that name it."""
    places: dict[str, list[int]] = {}
    for i, patch in enumerate(batch):
        places.setdefault(patch.site, []).append(i)

    def hook_for(mine: list[int]) -> Callable[..., Tensor]:
        def edit(value: Tensor, hook: Any) -> Tensor:
            for i in mine:
                rows = value[i * b : (i + 1) * b]
                out = batch[i].edit(rows)
                if out is not None and out is not rows:
                    value[i * b : (i + 1) * b] = out
            return value

        return edit

    return [(site, hook_for(mine)) for site, mine in places.items()]
