"""Path patching: what one mixer's output does through another mixer's input alone.

1. The sender's clean output replaces its corrupted one on the way to the receiver only: the receiver reads the
   corrupted residual stream plus the difference. (All mixers between keep their corrupted outputs.)
2. What then comes out of the receiver (or arrives at one of its sites) is patched into the corrupted run.
3. All later blocks run on from there.

Goldowsky-Dill et al. 2023, arXiv:2304.05969.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.captured import Positions, position_mask
from hooked_mamba.analysis.patch_runs import Metric, residuals
from hooked_mamba.frozen.run import out_site


@torch.no_grad()
def path_patch(
    model: Any,
    corrupted_tokens: Tensor | str | Sequence[str],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    receiver_site: str = "out_proj",
    positions: Positions = None,
    attention_mask: Tensor | None = None,
    progress: bool = True,
    batch_size: int = 32,
) -> Float[Tensor, "sender receiver"]:
    """The metric after patching every direct path from a sender to a receiver.

    Parameters
    ----------
    clean_cache
        Holds "embed" and "out_proj" of all layers.
    patching_metric
        From logits b l V to one number.
    receiver_site
        Which site of the receiver takes the sender's effect: "out_proj" for the whole mixer; "x_pre", "z", "dt",
        "B" or "C" for one of its inputs.
    positions
        Where the sender's output is patched; None: everywhere.
    batch_size
        Rows of one forward pass: several senders run side by side.

    Returns
    -------
    Tensor
        Rows: the embedding, then mixer 0, 1, ...; columns: mixer 0, 1, ..., then the logits. NaN where the sender
        does not come before the receiver.
    """
    tokens, found = model.input_to_tokens(corrupted_tokens)
    attention_mask = found if attention_mask is None else attention_mask
    b, length = tokens.shape
    n = model.cfg.n_layers
    entering = residuals(model, tokens, attention_mask)
    names = ["hook_embed", *(out_site(model, i) for i in range(n))]
    _, corrupted = model.run_with_cache(tokens, attention_mask=attention_mask, names_filter=names, return_type=None)
    where = position_mask(positions, b, length, tokens.device).unsqueeze(-1)
    changes = []
    for name in names:
        clean = clean_cache[name] if clean_cache.has_batch_dim else clean_cache[name][None]
        if clean.shape != corrupted[name].shape:
            raise ValueError(
                f"the clean run is {list(clean.shape[:2])} (batch, position) and the corrupted one {[b, length]};"
                " patching needs prompts of the same length"
            )
        changes.append((clean - corrupted[name]) * where)

    result = torch.full((n + 1, n + 1), torch.nan)
    at_once = max(1, batch_size // b)
    steps = [(r, list(range(f, min(f + at_once, r + 1)))) for r in range(n + 1) for f in range(0, r + 1, at_once)]
    for receiver, senders in tqdm(steps, disable=not progress, desc="path patching"):
        stream = entering[receiver].repeat(len(senders), 1, 1)
        seen = stream + torch.cat([changes[sender] for sender in senders]).to(stream.dtype)
        mask = None if attention_mask is None else attention_mask.repeat(len(senders), 1)
        if receiver == n:
            logits = model(seen, start_at_layer=n, attention_mask=mask)
        else:
            site = model.act_name(receiver_site, receiver)
            _, arrived = model.run_with_cache(
                seen,
                start_at_layer=receiver,
                stop_at_layer=receiver + 1,
                attention_mask=mask,
                names_filter=site,
            )
            with model.hooks([(site, lambda value, hook, new=arrived[site]: new)]):
                logits = model(stream, start_at_layer=receiver, attention_mask=mask)
        for sender, one in zip(senders, logits.split(b), strict=True):
            result[sender, receiver] = patching_metric(one)
    return result
