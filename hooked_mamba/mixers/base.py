"""The protocol of a branch, which every mixer, attention and MLP follows.

A branch is one file. It declares its sites (:class:`~hooked_mamba.hooks.site.Site`), its sizes, the weights that stay
float32, its memory and its equations; nothing outside of that file depends on its family.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.config import BranchConfig
from hooked_mamba.mixers.linear_form import LinearForm
from hooked_mamba.mixers.precision import KeepsFloat32
from hooked_mamba.state import BranchState, Call


class Branch(KeepsFloat32, LinearForm):
    """Reads the normalised residual stream and returns what is added to the stream.

    The methods of :class:`LinearForm` describe its linear form, with everything but the value path frozen.
    """

    kind: ClassVar[str] = ""
    """Its name among kinds of branches ("mamba"); a class without one is a base of others."""
    config_class: ClassVar[type[BranchConfig]] = BranchConfig
    """What shapes it: the first argument of its constructor, the layer being the second."""

    packs: ClassVar[bool] = False
    """Whether it keeps documents of one row apart (`Call.documents`)."""
    growing: ClassVar[tuple[str, ...]] = ()
    """Parts of its memory whose second axis is as long as the text so far, such as keys."""

    hands_on: Mapping[str, str] = {}
    """Name of a value that it leaves for later layers, in `Call.carry` -> the site that holds it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            KINDS[cls.kind] = cls

    def __init__(self, cfg: Any = None, layer: int = 0) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], BranchState]:
        """Normalised stream in; what is added to the stream, and the memory for the next call, out.

        What is added to columns that nobody reads (`call.read`) may be left out; the block drops what is not.

        Parameters
        ----------
        state
            State after the previous positions; None: there were none.
        call
            Padding, positions and what earlier layers left in this pass; None: an unpadded pass from the start.
        """

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> BranchState:
        """The empty state, on the weights' device; on "meta" only its shapes. A branch without a state has ()."""
        return ()

    def facts(self) -> tuple[tuple[str, object], ...]:
        """Pairs (what it is, its size) that tables of a model show."""
        return ()

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights as the paper's code draws them."""


def branch_class(cfg: BranchConfig) -> type[Branch]:
    """The branch class of a config.

    Raises
    ------
    TypeError
        No class takes it.
    """
    for cls in KINDS.values():
        if cls.config_class is type(cfg):
            return cls
    known = ", ".join(cls.config_class.__name__ for cls in KINDS.values())
    raise TypeError(f"no branch takes a {type(cfg).__name__}; there are branches of {known}")


KINDS: dict[str, type[Branch]] = {}
"""Every kind of branch by its name, in the order of definition."""
