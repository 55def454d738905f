"""What a cache can take apart of the residual stream: the decompositions of TransformerLens, under its names.

Every stack has its components in front, then the batch axis if the cache has one, then the positions unless
`pos_slice` is an int, then d. Components sum to what they decompose.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.hooks.positions import PositionSelect, PosSlice

Labelled = Tensor | tuple[Tensor, list[str]]
"""A stack, and with `return_labels=True` the names of its components."""


class ResidualDecomposition:
    """The part of :class:`ActivationCache` about the residual stream."""

    model: Any
    has_batch_dim: bool

    def __getitem__(self, key: Any) -> Tensor:
        raise KeyError(key)

    @torch.no_grad()
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mixer"] = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Labelled:
        """The residual stream entering `layer` as embedding and mixer outputs.

        Parameters
        ----------
        layer
            Mixers strictly before it; None, -1 or n_layers: all, which is what the final norm reads.
        mlp_input
            For TransformerLens' sake: these blocks have no MLP, so True is an error.
        mode
            "all", or "mixer", which is the same here, blocks having nothing but a mixer.
        apply_ln
            Divide by the scale, and multiply by the weight, of the norm that reads this stream.
        pos_slice
            Positions; an int drops the axis.
        incl_embeds
            Whether the embedding is the first component.
        return_labels
            Also return "embed", "0_mixer_out", "1_mixer_out", ...
        """
        _no_mlp(mlp_input)
        if mode not in ("all", "mixer"):
            raise ValueError(f"mode must be 'all' or 'mixer', got {mode!r}")
        upto = self.layer_index(layer)
        parts = [self.resid_entering(0, pos_slice)] if incl_embeds else []
        labels = ["embed"] if incl_embeds else []
        for i in range(upto):
            for name, branch in self.model.block(i).branches.items():
                if mode in ("all", name):
                    parts.append(self.at(self[f"blocks.{i}.{name}.{branch.out_site}"], pos_slice))
                    labels.append(f"{i}_{name}_out")
        return self._finish(self._stack(parts), labels, upto, apply_ln, pos_slice, return_labels)

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
            Up to and with the stream entering it; None, -1 or n_layers: all.
        incl_mid, mlp_input
            For TransformerLens' sake: there is no MLP, so True is an error.
        apply_ln
            Apply the norm of `layer` (the final norm for all) with its cached scale to every one of them.
        return_labels
            Also return "0_pre", "1_pre", ..., "final_post".
        """
        _no_mlp(mlp_input or incl_mid)
        upto = self.layer_index(layer)
        n_layers = self.model.cfg.n_layers
        stack = self._stack([self.resid_entering(i, pos_slice) for i in range(upto + 1)])
        labels = [f"{i}_pre" if i < n_layers else "final_post" for i in range(upto + 1)]
        return self._finish(stack, labels, upto, apply_ln, pos_slice, return_labels)

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
        """What components of the residual stream are after a norm: x / scale * weight, the cached scale for all.

        Of a LayerNorm its mean is taken away from each component; its bias belongs to none of them.

        Unlike TransformerLens' this multiplies by the norm's weight, so attributions sum to the logits whether norms
        are folded or not.

        Parameters
        ----------
        layer
            Whose norm; None, -1 or n_layers: the final norm.
        pos_slice
            Positions that the stack has; applied to the scale only.
        batch_slice
            Rows to take, from stack and scale.
        has_batch_dim
            Whether the stack has a batch axis; default: as the cache.
        recompute_ln
            Give each component the scale that it would have alone (the logit lens).
        """
        _no_mlp(mlp_input)
        upto = self.layer_index(layer)
        n_layers = self.model.cfg.n_layers
        has_batch = self.has_batch_dim if has_batch_dim is None else has_batch_dim and self.has_batch_dim
        if batch_slice is not None and has_batch:
            residual_stack = residual_stack[:, batch_slice]
        norm = self.model.ln_final if upto == n_layers else self.model.blocks[upto].norm
        residual_stack = as_norm_reads(norm, residual_stack)
        if recompute_ln:
            scale = (residual_stack.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        else:
            scale = self.at(self["scale"] if upto == n_layers else self["scale", upto], pos_slice)
            if batch_slice is not None and has_batch:
                scale = scale[batch_slice]
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

        The final norm's scale is taken as it was, so over a full decomposition the attributions sum to the logit.

        Parameters
        ----------
        residual_stack
            Components, as :meth:`decompose_resid` and its kin return them.
        tokens
            One token (its text or id), one a row, or one a row and position.
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
        has_positions = PositionSelect(pos_slice).keeps_axis
        if directions.ndim == 2 and has_positions and stack.ndim == 4:
            directions = directions.unsqueeze(-2)  # one token a row, at all its positions
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
        select = PositionSelect(pos_slice)
        return select.apply(value) if self.has_batch_dim else select.apply(value[None])[0]

    def logit_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Unembedding columns of tokens, a row of them for a row of tokens, also for a row of one."""
        if isinstance(tokens, Tensor) and tokens.ndim:
            return self.model.W_U.t()[tokens]
        return self.model.tokens_to_residual_directions(tokens)

    def _stack(self, parts: list[Tensor]) -> Tensor:
        """In the residual stream's own precision, which may be wider than the mixers'."""
        if not parts:
            raise ValueError("nothing to stack: layer 0 without the embedding has no components")
        wide = parts[0].dtype
        for part in parts:
            wide = torch.promote_types(wide, part.dtype)
        return torch.stack([part.to(wide) for part in parts])

    def _finish(
        self, stack: Tensor, labels: list[str], layer: int, apply_ln: bool, pos_slice: PosSlice, return_labels: bool
    ) -> Labelled:
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack


def as_norm_reads(norm: Any, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """What a norm divides by its scale: x, of a LayerNorm (which has a bias) x without its mean."""
    return x - x.mean(-1, keepdim=True) if getattr(norm, "bias", None) is not None else x


def _no_mlp(asked: bool) -> None:
    if asked:
        raise ValueError("incl_mid and mlp_input ask for the stream between mixer and MLP; these blocks have no MLP")
