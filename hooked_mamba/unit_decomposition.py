"""Decompositions of attention, MLPs and experts from a cache: heads, neurons and single experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.decomposition import Labelled
from hooked_mamba.hooks.positions import PositionSelect, PosSlice
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.ssm_decomposition import SSMDecomposition
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS

Units = tuple[Float[Tensor, "*batch_and_pos unit w"], Float[Tensor, "unit w d"]]
"""Of one branch: what each unit holds, and the weights by which it writes into the stream."""


class UnitDecomposition(SSMDecomposition):
    """The part of :class:`ActivationCache` about the units of attention, MLPs and experts."""

    @torch.no_grad()
    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        kind: Literal["mixer", "attn"] | None = None,
    ) -> Labelled:
        """What every head before `layer` adds to the residual stream.

        Parameters
        ----------
        layer
            Blocks strictly before it; -1: all.
        kind
            "attn": heads of attention. "mixer": heads of state-space mixers (Mamba-1 has none). None: the mixers' if
            there are any, else attention's.
        return_labels
            Also return "L0H0", "L0H1", ...
        incl_remainder
            Add a last component, "remainder": the rest of the stream.
        pos_slice
            Positions; an int drops the axis.
        apply_ln
            As in :meth:`decompose_resid`.
        project_output_onto
            A direction d, or several d k: give the products with them.
        """
        upto = self.layer_index(layer)
        if kind not in ("mixer", "attn", None):
            raise ValueError(f"kind must be 'mixer' or 'attn', got {kind!r}")
        if kind == "mixer" or (kind is None and self.mixer_layers(self.model.cfg.n_layers)):
            return super().stack_head_results(
                layer, return_labels, incl_remainder, pos_slice, apply_ln, project_output_onto
            )

        def heads(i: int) -> Units:
            attn = self.model.block(i).branches["attn"]
            z = self.at(self[f"blocks.{i}.attn.hook_z"], pos_slice)
            return z, rearrange(attn.o_proj.weight, "d (h c) -> h c d", c=z.shape[-1])

        return self._units(
            "attn", "H", heads, upto, return_labels, incl_remainder, pos_slice, apply_ln, project_output_onto
        )

    @knows_options(OPTIONS, GRANTED)
    @torch.no_grad()
    def stack_neuron_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """What every neuron of every MLP before `layer` adds; arguments as :meth:`stack_head_results`.

        Labels are "L0N0", "L0N1", ... With `project_output_onto` it takes d times less memory.
        """

        def neurons(i: int) -> Units:
            post = self.at(self[f"blocks.{i}.mlp.hook_post"], pos_slice)
            return post.unsqueeze(-1), self.model.block(i).branches["mlp"].down_proj.weight.t().unsqueeze(1)

        upto = self.layer_index(layer)
        return self._units(
            "mlp", "N", neurons, upto, return_labels, incl_remainder, pos_slice, apply_ln, project_output_onto
        )

    @torch.no_grad()
    def stack_expert_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """What every expert of every mixture before `layer` adds, routing weight included; 0 where it was not chosen.

        Labels are "L0E0", "L0E1", ... Needs a cache that holds `hook_expert_out`, which one without a filter does not.
        """

        def experts(i: int) -> Units:
            moe, at = self.model.block(i).branches["moe"], f"blocks.{i}.moe"
            out = self.at(self[f"{at}.hook_expert_out"], pos_slice)
            weights = self.at(self[f"{at}.hook_expert_weights"], pos_slice).to(out.dtype).unsqueeze(-1)
            chosen = self.at(self[f"{at}.hook_expert_indices"], pos_slice).unsqueeze(-1).expand_as(out)
            spread = out.new_zeros(*out.shape[:-2], moe.cfg.n_experts, out.shape[-1])
            spread = spread.scatter_add(-2, chosen, out * weights)
            eye = torch.eye(out.shape[-1], dtype=out.dtype, device=out.device)
            W = eye if moe.cfg.d_latent is None else moe.latent_out.weight.t()
            return spread, W.expand(moe.cfg.n_experts, -1, -1)

        upto = self.layer_index(layer)
        return self._units(
            "moe", "E", experts, upto, return_labels, incl_remainder, pos_slice, apply_ln, project_output_onto
        )

    def pattern(
        self, layer: int, heads: Any = None, queries: PosSlice = None
    ) -> Float[Tensor, "... head target source"]:
        """Attention's own pattern in one layer: batch, head, target, source.

        Parameters
        ----------
        heads
            Query heads; an int drops the axis. None: all.
        queries
            Target positions, as a `pos_slice`; an int drops the axis.
        """
        found = self[f"blocks.{layer}.attn.hook_pattern"]
        if heads is not None:
            found = found.select(-3, heads) if isinstance(heads, int) else found[..., list(heads), :, :]
        select = PositionSelect(queries)
        return select.apply(found, found.ndim - 2)

    # Helpers -------------------------------------------------------------------------------------------------

    def _units(
        self,
        branch: str,
        letter: str,
        units: Callable[[int], Units],
        upto: int,
        return_labels: bool,
        incl_remainder: bool,
        pos_slice: PosSlice,
        apply_ln: bool,
        onto: Tensor | None,
    ) -> Labelled:
        """Every unit's value times its output weights, stacked branch by branch."""
        layers = [i for i, name in self.writers(upto) if name == branch]
        if not layers:
            raise ValueError(
                f"no block before {upto} has a branch {branch!r} that writes into the stream; units of mixers: use"
                " stack_channel_results, or stack_head_results where they have heads"
            )
        final = self.resid_entering(upto, pos_slice)
        shown, scale = self._reading(upto, apply_ln, pos_slice, onto)
        parts, labels = [], []
        for i in layers:
            values, W = units(i)
            W = shown(W.to(final.dtype)) * self.out_scale(i, branch)
            n = len(W) * final[..., 0].numel() * W.shape[-1]
            self._check_fits(n, final.dtype, "the stack", "choose positions with pos_slice, or use project_output_onto")
            parts.append(torch.einsum("...uw,uwd->u...d", values.to(final.dtype), W) / scale)
            labels += [f"L{i}{letter}{u}" for u in range(len(W))]
        stack = torch.cat(parts)
        if incl_remainder:
            stack = torch.cat([stack, (shown(final) / scale - stack.sum(0))[None]])
            labels = [*labels, "remainder"]
        stack = stack[..., 0] if onto is not None and onto.ndim == 1 else stack
        return (stack, labels) if return_labels else stack
