"""RWKV's token shift: the input of the position before, within each row's real tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.state import Padding, with_history


def shifted(
    x: Float[Tensor, "b l d"], last: Float[Tensor, "b d"] | None, padding: Padding | None
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
    """x one position later, and each row's last real x for the next call.

    Parameters
    ----------
    x
        Inputs.
    last
        The real input before the first position; None: there was none, which reads as 0.
    """
    history = x.new_zeros(len(x), 1, x.shape[2]) if last is None else last.unsqueeze(1)
    longer, before, after = with_history(x, history, padding)
    if before is not None:  # without padding the history is not in it yet
        longer = torch.cat([before, longer], 1)
    return longer[:, :-1], after[:, 0]
