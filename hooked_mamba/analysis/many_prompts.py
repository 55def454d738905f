"""A sweep over many prompts: each prompt on its own, shared among processes, results kept as they come.

# many.py
with torchrun():
    sweep_prompts(model, patching.get_act_patch_resid_pre, clean, corrupted, metric, "out/sweep")

torchrun --nproc-per-node 2 many.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from hooked_mamba.pieces import Pieces, digest, joined


@torch.no_grad()
def sweep_prompts(
    model: HookedModel,
    sweep: Callable[..., Tensor],
    clean: Int[Tensor, "n l"],
    corrupted: Int[Tensor, "n l"],
    metric: Callable[[Tensor, int], Tensor | float],
    folder: str | Path,
    *,
    prompts_per_piece: int = 8,
    names_filter: Any = None,
    progress: bool = True,
    **options: Any,
) -> Float[Tensor, "n ..."]:
    """A patching sweep of every pair of prompts; under torchrun its processes share them.

    A stopped run continues when it is called again, with as many processes as there then are. The numbers are the same,
    bit for bit, however many processes there were.

    Parameters
    ----------
    sweep
        A ready-made one, such as `patching.get_act_patch_resid_pre`, or any function of (model, corrupted tokens, clean
        cache, metric, progress=, **options) that returns a tensor.
    clean, corrupted
        Tokens of the clean prompts, and of those that are patched; such as `load_tensors("prompts")["clean"]`.
    metric
        From (logits 1 l V, number of the prompt) to one number.
    folder
        Of the results. Sweeps with another model, prompts, options or another sweep are refused there; the metric
        cannot be compared, so that a folder should have one metric only.
    prompts_per_piece
        Prompts whose results are written together.
    names_filter
        What the clean run keeps; None: all default sites.
    options
        Of the sweep.

    Returns
    -------
    Tensor
        The results, one prompt after the other.

    Raises
    ------
    ValueError
        Clean and corrupted prompts of different shapes, or fewer than one prompt a piece.
    PiecesError
        The folder holds other work.
    """
    if clean.shape != corrupted.shape or clean.ndim != 2:
        raise ValueError(f"clean prompts are {list(clean.shape)} and corrupted ones {list(corrupted.shape)}, not alike")
    if prompts_per_piece < 1:
        raise ValueError(f"prompts_per_piece must be at least 1, got {prompts_per_piece}")
    about = {
        "sweep": f"{sweep.__module__}.{getattr(sweep, '__qualname__', type(sweep).__name__)}",
        "model": model_hash(model),
        "clean": digest(clean),
        "corrupted": digest(corrupted),
        "prompts_per_piece": prompts_per_piece,
        "options": {name: repr(value) for name, value in sorted(options.items())},
    }

    def one(i: int) -> Tensor:
        _, cache = model.run_with_cache(clean[i : i + 1], names_filter=names_filter)
        return sweep(model, corrupted[i : i + 1], cache, lambda logits: metric(logits, i), progress=False, **options)

    def work(_: int, start: int) -> dict[str, Tensor]:
        return {"results": torch.stack([one(i) for i in range(start, min(start + prompts_per_piece, len(clean)))])}

    starts = range(0, len(clean), prompts_per_piece)
    pieces = Pieces(folder, about).run(starts, work, total=len(starts), progress=progress, description="prompts")
    return joined(list(pieces))["results"]
