"""Windows: what a coder reads of several positions, side by side, as a causal convolution reads its inputs.

x_t of the coder = (n_{t-K+1}, ..., n_t)        the oldest first; zeros before a row's or a document's first token
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.analysis.captured import Padded
from hooked_mamba.documents import Documents, restarted
from hooked_mamba.state import Padding, with_history, zero_padding


@dataclass(frozen=True)
class Beginnings:
    """Where the texts of a pass begin: no window reaches further back."""

    padding: Padding | None = None
    """None: nothing is padded."""
    documents: Documents | None = None
    """None: each row is one."""


def windows(
    x: Float[Tensor, "b l d"],
    window: int,
    beginnings: Beginnings = Beginnings(),  # frozen
    history: Float[Tensor, "b k d"] | None = None,
) -> tuple[Float[Tensor, "b l window_d"], Float[Tensor, "b k d"]]:
    """The windows of all positions, and the last k = window - 1 values for a call that continues.

    Parameters
    ----------
    x
        A site's values.
    window
        Positions side by side.
    beginnings
        Padding, and documents packed into the rows.
    history
        The k values before the first position; None: zeros.
    """
    k, padding, documents = window - 1, beginnings.padding, beginnings.documents

    def side_by_side(x: Tensor, before: Tensor | None) -> Tensor:
        before = x.new_zeros(len(x), k, x.shape[2]) if before is None else before
        longer, l = torch.cat([before, x], 1), x.shape[1]
        return torch.cat([longer[:, j : j + l] for j in range(window)], -1)

    past = x.new_zeros(len(x), k, x.shape[2]) if history is None else history
    longer, before, after = with_history(zero_padding(padding)(x), past, padding, documents)
    return restarted(documents, k, side_by_side, longer, before)[:, -x.shape[1] :], after


class CarriedWindows:
    """The windows of one site in pass after pass; while `generate` runs, each call continues the one before."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._last: Tensor | None = None

    def __call__(
        self, x: Float[Tensor, "b l d"], told: Padded, columns_before: int | None, rows_move: bool = False
    ) -> Float[Tensor, "b l window_d"]:
        """The windows of the pass under way.

        Parameters
        ----------
        told
            What the pass was told of its rows.
        columns_before
            Columns of earlier calls while `generate` runs, else None.
        rows_move
            Whether the calls of `generate` have their rows in different orders.

        Raises
        ------
        ValueError
            The pass continues from a memory, which does not hold what a window reads of earlier calls.
        """
        continues = bool(columns_before)
        if (rows_move or self._last is None) if continues else told.continues:
            raise ValueError(
                f"a coder that reads a window of {self.window} positions cannot continue from an initial state or in a"
                " beam search: no memory holds what it reads of earlier positions. Run the whole text in one call, or"
                " generate from it with num_beams=1"
            )
        history = self._last if continues else None
        found, last = windows(x, self.window, Beginnings(told.padding, told.documents), history)
        self._last = None if columns_before is None else last
        return found
