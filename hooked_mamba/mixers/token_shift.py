"""RWKV's token shift: the input of the position before, within each row's real tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.components import at_least_fp32
from hooked_mamba.documents import Documents
from hooked_mamba.frozen.linear import Conv, Gain, Piece, Project
from hooked_mamba.state import Padding, with_history


def shifted(
    x: Float[Tensor, "b l d"],
    last: Float[Tensor, "b d"] | None,
    padding: Padding | None,
    documents: Documents | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
    """x one position later, and each row's last real x for the next call.

    Parameters
    ----------
    x
        Inputs.
    last
        The real input before the first position; None: there was none, which reads as 0.
    padding, documents
        Columns that hold no token; documents packed into the rows, whose first inputs have none before them.
    """
    history = x.new_zeros(len(x), 1, x.shape[2]) if last is None else last.unsqueeze(1)
    longer, before, after = with_history(x, history, padding)
    if before is not None:  # without padding the history is not in it yet
        longer = torch.cat([before, longer], 1)
    before_each = longer[:, :-1]
    return before_each if documents is None else documents.zero_starts(before_each), after[:, 0]


def held_shift(
    norm: Gain, mu: Float[Tensor, " d"], read_by: Project, last: Float[Tensor, "b d"] | None, mask: Any, like: Tensor
) -> list[Piece]:
    """W (x + mu (x_{t-1} - x)) as pieces: the norm, two taps on each channel of what it gives, the weights.

    Parameters
    ----------
    norm
        Held.
    mu
        The mix.
    read_by
        The weights.
    last
        The normalised input before the first position; None: there was none.
    mask
        Real positions; None: all are.
    like
        A tensor with the rows of the batch, of the dtype that is computed in.
    """
    mu = at_least_fp32(mu.detach()).to(like.dtype)
    history = like.new_zeros(like.shape[0], 1, len(mu)) if last is None else last.unsqueeze(1).to(like.dtype)
    padding = [] if mask is None else [Gain(mask.unsqueeze(-1).to(like.dtype))]
    return [norm, *padding, Conv(torch.stack([mu, 1 - mu], 1), torch.zeros_like(mu), history), read_by]
