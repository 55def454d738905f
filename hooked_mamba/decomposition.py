"""Decompositions of the residual stream from a cache, under TransformerLens' names.

Every stack has its components in front, then the batch axis if the cache has one, then the positions unless
`pos_slice` is an int, then d. Components sum to what they decompose.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.hooks.positions import PosSlice

Labelled = Tensor | tuple[Tensor, list[str]]
"""A stack, and with `return_labels=True` the names of its components."""


class ResidualDecomposition:
    """The part of :class:`ActivationCache` about the residual stream."""

    model: Any
    has_batch_dim: bool
    selected: Any

    def __getitem__(self, key: Any) -> Tensor:
        raise KeyError(key)

    @torch.no_grad()
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mixer", "attn", "mlp", "moe"] = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """The residual stream entering `layer`, decomposed into the embedding and what each earlier branch adds.

        Parameters
        ----------
        layer
            Blocks strictly before it; None, -1 or n_layers: all, which is what the final norm reads.
        mlp_input
            Include the first stage of `layer` itself: the stream that its second norm reads. An error if the block has
            only one stage.
        mode
            "all", or a branch name such as "mixer" or "mlp": only what those branches add.
        apply_ln
            Divide by the scale, and multiply by the weight, of the norm that reads this stream.
        pos_slice
            Positions; an int drops the axis.
        incl_embeds
            Whether the embedding is the first component.
        return_labels
            Also return "embed", "0_mixer_out", "0_mlp_out", "1_attn_out", ...
        """
        upto = self.layer_index(layer)
        known = {name for i in range(self.model.cfg.n_layers) for name in self.model.block(i).written}
        if mode != "all" and mode not in known:
            raise ValueError(f"mode must be 'all' or one of {', '.join(sorted(known))}, got {mode!r}")
        parts = [self.resid_entering(0, pos_slice)] if incl_embeds else []
        labels = ["embed"] if incl_embeds else []
        for i, name in self.writers(upto, mlp_input):
            if mode in ("all", name):
                parts.append(self.at(self[f"blocks.{i}.{self.model.block(i).written[name]}"], pos_slice))
                labels.append(f"{i}_{name}_out")
        return self._finish(self._stack(parts), labels, upto, apply_ln, pos_slice, return_labels, mlp_input)

    @torch.no_grad()
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Labelled:
        """The residual stream entering every block up to `layer`; the last of all is what the final norm reads.

        Parameters
        ----------
        layer
            Up to and including the stream entering it; None, -1 or n_layers: all.
        incl_mid
            Also the streams between the stages of a block that has two.
        mlp_input
            The last of them is what the second norm of `layer` reads.
        apply_ln
            Apply the norm of `layer` (the final norm for all) with its cached scale to every one of them.
        return_labels
            Also return "0_pre", "0_mid", "1_pre", ..., "final_post".
        """
        upto = self.layer_index(layer)
        n_layers = self.model.cfg.n_layers
        if mlp_input:
            self.writers(upto, True)  # says so where there is no second stage
        parts, labels = [], []
        for i in range(upto + 1):
            parts.append(self.resid_entering(i, pos_slice))
            labels.append(f"{i}_pre" if i < n_layers else "final_post")
            middle = f"blocks.{i}.hook_resid_mid"
            if middle in self.model.hook_dict and (mlp_input if i == upto else incl_mid):
                parts.append(self.at(self[middle], pos_slice))
                labels.append(f"{i}_mid")
        return self._finish(self._stack(parts), labels, upto, apply_ln, pos_slice, return_labels, mlp_input)

    @torch.no_grad()
    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch_and_pos d"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: Any = None,
        has_batch_dim: bool | None = None,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *batch_and_pos_out d"]:
        """Components of the residual stream after a norm: x / scale * weight, with the cached scale for all.

        A LayerNorm's mean is subtracted from each component; its bias belongs to none of them.

        Unlike in TransformerLens this multiplies by the norm's weight, so attributions sum to the logits whether norms
        are folded or not.

        Parameters
        ----------
        layer
            Whose norm; None, -1 or n_layers: the final norm.
        mlp_input
            The norm of the block's second stage.
        pos_slice
            Positions that the stack has; applied to the scale only.
        batch_slice
            Rows to take, from stack and scale.
        has_batch_dim
            Whether the stack has a batch axis; default: as the cache.
        recompute_ln
            Give each component the scale it would have alone (the logit lens).
        """
        upto = self.layer_index(layer)
        has_batch = self.has_batch_dim if has_batch_dim is None else has_batch_dim and self.has_batch_dim
        if batch_slice is not None and has_batch:
            residual_stack = residual_stack[:, batch_slice]
        norm, name = self.norm_reading(upto, mlp_input)
        residual_stack = as_norm_reads(norm, residual_stack)
        if recompute_ln:
            scale = (residual_stack.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        else:
            scale = self.at(self[f"{name}.hook_scale"], pos_slice)
            if batch_slice is not None and has_batch:
                scale = scale[batch_slice]
            if residual_stack.shape[1:-1] != scale.shape[:-1]:  # they would broadcast, to wrong numbers
                raise ValueError(
                    f"the stack is {list(residual_stack.shape)} and the scale of the norm that reads it"
                    f" {list(scale.shape)}: give the pos_slice and batch_slice that the stack was made with"
                )
        return residual_stack / scale * norm.weight

    @torch.no_grad()
    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_and_pos d"],
        tokens: str | int | Int[Tensor, "..."],
        incorrect_tokens: str | int | Int[Tensor, "..."] | None = None,
        pos_slice: PosSlice = None,
        batch_slice: Any = None,
        has_batch_dim: bool | None = None,
    ) -> Float[Tensor, "component ..."]:
        """What each component adds to the logit of a token, or to a difference of two tokens' logits.

        The final norm's scale is frozen, so over a full decomposition the attributions sum to the logit.

        Parameters
        ----------
        residual_stack
            Components, as returned by :meth:`decompose_resid` and the like.
        tokens
            One token (its text or id), one per row, or one per row and position.
        incorrect_tokens
            Subtract these tokens' attributions; of the same shape as `tokens`.
        pos_slice, batch_slice, has_batch_dim
            As in :meth:`apply_ln_to_stack`.
        """
        directions = self.logit_directions(tokens)
        if incorrect_tokens is not None:
            other = self.logit_directions(incorrect_tokens)
            if other.shape != directions.shape:
                raise ValueError(
                    f"tokens and incorrect_tokens differ in shape: {list(directions.shape[:-1])} and"
                    f" {list(other.shape[:-1])}"
                )
            directions = directions - other
        stack = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim)
        has_positions = self.selected(pos_slice).keeps_axis
        if directions.ndim == 2 and has_positions and stack.ndim == 4:
            directions = directions.unsqueeze(-2)  # one token per row, at all its positions
        return (stack * directions.to(stack.dtype)).sum(-1)

    # Helpers -------------------------------------------------------------------------------------------------

    def layer_index(self, layer: int | None) -> int:
        """None, -1 and n_layers: after the last block; else 0 to n_layers - 1."""
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise IndexError(f"layer must be from 0 to {n_layers}, or -1 or None for the end, got {layer}")
        return layer

    def resid_entering(self, layer: int, pos_slice: PosSlice = None) -> Tensor:
        """The residual stream that enters a block; layer n_layers: what the final norm reads."""
        last = layer == self.model.cfg.n_layers
        return self.at(self["resid_post", layer - 1] if last else self["resid_pre", layer], pos_slice)

    def at(self, value: Tensor, pos_slice: PosSlice) -> Tensor:
        """Chosen positions of a cached value."""
        select = self.selected(pos_slice)
        return select.apply(value) if self.has_batch_dim else select.apply(value[None])[0]

    def logit_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Unembedding columns of tokens, including the logits' factor; one row per row of tokens, even a single one."""
        if isinstance(tokens, Tensor) and tokens.ndim:
            found = self.model.W_U.t()[tokens]
        else:
            found = self.model.tokens_to_residual_directions(tokens)
        factor = self.model.logit_multiplier
        return found if factor is None else found * factor

    def writers(self, upto: int, mlp_input: bool = False) -> list[tuple[int, str]]:
        """(block, branch) of all that write into the stream before block `upto`, or before its second stage.

        Raises
        ------
        ValueError
            `mlp_input`, and the block has no second stage that reads the stream.
        """
        found = [(i, name) for i in range(upto) for name in self.model.block(i).written]
        if not mlp_input:
            return found
        if f"blocks.{upto}.hook_resid_mid" not in self.model.hook_dict:
            where = f"block {upto} has none" if upto < self.model.cfg.n_layers else "after the last block there is none"
            raise ValueError(
                f"mlp_input asks for the stream between two stages of a block, such as mixer and MLP: {where}"
            )
        block = self.model.block(upto)
        return found + [(upto, name) for name in block.stages[0] if name in block.written]

    def norm_reading(self, upto: int, mlp_input: bool = False) -> tuple[Any, str]:
        """The norm that reads the stream entering a block (n_layers: the final norm), and its full name."""
        if upto == self.model.cfg.n_layers:
            return self.model.ln_final, "ln_final"
        if mlp_input:
            self.writers(upto, True)
        name = f"blocks.{upto}.{self.model.block(upto).norm_names[1] if mlp_input else 'norm'}"
        return self.model.get_submodule(name), name

    def _stack(self, parts: list[Tensor]) -> Tensor:
        """In the residual stream's own precision, which may be wider than the mixers'."""
        if not parts:
            raise ValueError("nothing to stack: layer 0 without the embedding has no components")
        wide = parts[0].dtype
        for part in parts:
            wide = torch.promote_types(wide, part.dtype)
        return torch.stack([part.to(wide) for part in parts])

    def _finish(
        self,
        stack: Tensor,
        labels: list[str],
        layer: int,
        apply_ln: bool,
        pos_slice: PosSlice,
        return_labels: bool,
        mlp_input: bool = False,
    ) -> Labelled:
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack


def as_norm_reads(norm: Any, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """What a norm divides by its scale: x, or for a LayerNorm (which has a bias) x without its mean."""
    return x - x.mean(-1, keepdim=True) if getattr(norm, "bias", None) is not None else x
