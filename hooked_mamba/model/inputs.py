"""Checks of a model's inputs: tokens, residual streams, layers and states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.model.text import PaddingSide
from hooked_mamba.state import BlockState, ModelState


class Inputs:
    """Checks of a forward pass's arguments, for a model with TextMethods and a stack of blocks."""

    cfg: Any
    device: Any
    to_tokens_and_mask: Any
    initial_state: Any
    blocks: Any
    _checked: tuple[int, ModelState] | None = None
    """The batch of the last state that was checked, and the shapes due."""
    _due: list[list[Any]]

    def input_to_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens b l of any input, checked, and the mask of a padded list of texts."""
        if not isinstance(input, Tensor):
            if not hasattr(input, "__len__"):
                raise TypeError(f"expected text or token ids, got {type(input).__name__}: {input!r}")
            if not isinstance(input, str) and len(input) == 0:
                raise ValueError(f"the input is empty: {input!r}")
            if isinstance(input, str) or (isinstance(input, Sequence) and all(isinstance(t, str) for t in input)):
                tokens, mask = self.to_tokens_and_mask(input, prepend_bos, padding_side)
                return tokens, None if bool(mask.all()) else mask
            input = torch.as_tensor(input, device=self.device)
        tokens = input[None] if input.ndim == 1 else input
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype is torch.bool:
            raise ValueError(
                f"expected text or token ids of shape [batch, position], got {tokens.dtype} {list(input.shape)};"
                " a residual stream needs start_at_layer"
            )
        if tokens.shape[1] == 0 or tokens.shape[0] == 0:
            raise ValueError(f"the input is empty: tokens of shape {list(tokens.shape)}")
        if not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.cfg.d_vocab:
                raise IndexError(
                    f"token id {low if low < 0 else high} is out of range: the vocabulary has {self.cfg.d_vocab} rows"
                )
        return tokens.to(self.device, torch.long), None

    def layer_range(self, start: int | None, stop: int | None) -> range:
        n = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n <= layer <= n:
                raise IndexError(f"{name}={layer} is out of range for a model of {n} layers")
        return range(n)[start:stop]

    def checked_residual(self, resid: Any) -> Tensor:
        if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[2] != self.cfg.d_model:
            got = list(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
            raise ValueError(f"start_at_layer takes a residual stream [batch, position, {self.cfg.d_model}], got {got}")
        if 0 in resid.shape or not resid.is_floating_point():
            raise ValueError(f"the residual stream is {resid.dtype} {list(resid.shape)}, expected floats, one or more")
        return resid

    def _shapes(self, layer: int, state: BlockState) -> list[Any]:
        """Of each branch its name and the shapes of its memory, with 0 for as many positions as it has."""
        found: list[Any] = []
        branches = self.blocks[layer].branches
        for name, parts in state.branches.items():
            growing = branches[name].growing if name in branches else ()
            found.append(name)
            for part, tensor in zip(getattr(parts, "_fields", ()), parts, strict=False):
                shape = tensor.shape
                found.append((shape[0], 0, *shape[2:]) if part in growing else shape)
        return found

    def check_state(self, state: ModelState, batch: int) -> None:
        if not isinstance(state, ModelState):
            raise TypeError(f"initial_state must be a ModelState as return_state gives it, got {type(state).__name__}")
        if len(state) != self.cfg.n_layers:
            raise ValueError(f"initial_state has {len(state)} layers, the model has {self.cfg.n_layers}")
        if not (self._checked and self._checked[0] == batch):
            self._checked = batch, self.initial_state(batch, "meta")
            self._due = [self._shapes(i, block) for i, block in enumerate(self._checked[1])]
        if all(self._shapes(i, block) == due for i, (block, due) in enumerate(zip(state, self._due, strict=True))):
            return  # the usual case, quickly: a step of generation asks too
        for i, (mine, expected) in enumerate(zip(state, self._checked[1], strict=True)):
            if mine.branches.keys() != expected.branches.keys():
                raise ValueError(
                    f"initial_state[{i}] is the memory of {', '.join(mine.branches) or 'nothing'}, block {i} has"
                    f" {', '.join(expected.branches)}"
                )
            for (part, got), (_, want) in zip(mine.items(), expected.items(), strict=True):
                branch, _, name = part.partition(".")
                if got.shape == want.shape:
                    continue
                found, due = list(got.shape), list(want.shape)
                if name in self.blocks[i].branches[branch].growing:
                    due[1:2] = found[1:2]
                if found != due:
                    raise ValueError(f"initial_state[{i}].{part.removeprefix('mixer.')} is {found}, expected {due}")
