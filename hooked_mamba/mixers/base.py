"""What a block asks of a branch: the protocol that every mixer, attention and MLP keeps.

A branch is one file. It declares its sites (:class:`~hooked_mamba.hooks.site.Site`), its sizes, the weights that stay
float32, its memory and its equations; nothing outside of that file knows its family.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.mixers.linear_form import LinearForm
from hooked_mamba.mixers.precision import KeepsFloat32
from hooked_mamba.state import BranchState, Call


class Branch(KeepsFloat32, LinearForm):
    """Reads the normalised residual stream and gives what is added to the stream.

    How it is taken apart, once all but its value path is held, is said by the methods of :class:`LinearForm`.
    """

    kind: ClassVar[str] = ""
    """Its name among kinds of branches ("mamba"); a class without one is a base of others."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            KINDS[cls.kind] = cls

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b l d"], BranchState]:
        """Normalised stream in; what is added to the stream, and the memory for the next call, out.

        Parameters
        ----------
        state
            Memory after the positions before; None: there were none.
        call
            Padding, positions and what earlier layers left in this pass; None: an unpadded pass from the start.
        """

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> BranchState:
        """The empty memory, where the weights are; on "meta" its shapes alone. A branch without memory has ()."""
        return ()

    def facts(self) -> tuple[tuple[str, object], ...]:
        """Pairs (what it is, its size) that tables of a model show."""
        return ()

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights as the paper's code draws them."""


KINDS: dict[str, type[Branch]] = {}
"""Every kind of branch by its name, in the order of definition."""
