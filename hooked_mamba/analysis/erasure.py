"""The exact effect of switching off any single write, removal or decay of a state.

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T,      y_t = S_t r_t,      T = sum_t vy_t . y_t

T is affine in each single write, removal and decay, so one forward scan (S, recall) and one reverse scan (Lam) give the
change of T when any ONE of them is switched off:

    write      -v_s . Lam_s k_s                     v_s k_s^T is not written
    removal    -(S_{s-1} a_s) . Lam_s b_s           what is stored under the key stays
    decay      <S_{s-1} (1 - w_s), Lam_s>           w_s = 1; where the removal reads the decayed state, also there

Mamba-3 has no removals; its write enters at two positions, and both halves are switched off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.display import Shown
from hooked_mamba.frozen.run import Run


@dataclass(frozen=True)
class Erasure(Shown):
    """Changes of a target when one thing at one position is switched off; batch, position."""

    write: Float[Tensor, "b l"]
    """The value is not written into the state; what reads it beside the state (RWKV-7's bonus) stays."""
    removal: Float[Tensor, "b l"]
    """What lies under the key is not removed; 0 where the recurrence removes nothing."""
    decay: Float[Tensor, "b l"]
    """The state does not decay."""


@torch.no_grad()
def erasure(run: Run, layer: int, head: int, target: str | int | Float[Tensor, "..."]) -> Erasure:
    """The effect of switching off each single write, removal and decay of one head, in linear time.

    Everything else is frozen at the run's values: selection, gates, norms' divisors, and all other layers, so that the
    target is what this layer's mixer adds directly. Effects of switching off several together do not sum: without one
    removal, there is more for the next one to remove.

    Parameters
    ----------
    run
        A :class:`~hooked_mamba.frozen.run.Run` of the prompt.
    layer, head
        Which mixer, and which of its heads.
    target
        A token (text or id), for its logit at the last position through the final norm; or a covector on what the
        mixer adds to the stream: d (at the last position), or batch position d.

    Returns
    -------
    Erasure
        Target when switched off - target.

    Raises
    ------
    ValueError
        Erasure is not defined for this mixer, or the covector has the wrong shape.
    IndexError
        A layer, head or token that does not exist.
    """
    if not -run.n_layers <= layer < run.n_layers:
        raise IndexError(f"layer {layer} is out of range: there are {run.n_layers}")
    chain = run.chain(layer % run.n_layers)
    rows = torch.arange(run.batch, device=run.tokens.device)
    vy = chain.pull(_covector(run, target), rows, until="y").below
    try:
        return Erasure(*chain.scan.switched_off(head, vy, chain.h0))
    except NotImplementedError as error:
        title = run.model.mixer(layer % run.n_layers).title
        raise ValueError(f"erasure is defined for delta rules and Mamba-3; layer {layer} is {title}") from error


def _covector(run: Run, target: str | int | Tensor) -> Float[Tensor, "b l d"]:
    """The target as a covector on the stream."""
    out = torch.zeros_like(run.resid(run.n_layers))
    if not isinstance(target, Tensor):
        direction = run.unembedding[:, run.token_id(target)]
        rows = torch.arange(run.batch, device=out.device)
        out[:, -1] = run.behind_norm(run.n_layers, direction.expand(run.batch, -1), (rows, run.length - 1))
        return out
    if target.shape == out.shape:
        return target.to(out.dtype)
    if target.shape != out.shape[2:]:
        raise ValueError(f"target must be a token, [{out.shape[2]}] or {list(out.shape)}; got {list(target.shape)}")
    out[:, -1] = target.to(out.dtype)
    return out
