"""Decompositions of the mixers from a cache: channels, heads, source positions, states and hidden attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.decomposition import Labelled, ResidualDecomposition, as_norm_reads
from hooked_mamba.frozen.scan import HeldScan
from hooked_mamba.frozen.selective import SelectiveScan
from hooked_mamba.frozen.tokens import Source as Source
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.positions import PositionSelect, PosSlice
from hooked_mamba.memory import available_bytes
from hooked_mamba.mixers.linear_form import Read
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS


class SSMDecomposition(ResidualDecomposition):
    """The part of :class:`ActivationCache` about what happens inside mixers, by their linear forms.

    For Mamba everything here is computed from x, dt, B, C, z and the norms' scales as cached: edits that hooks made to
    A_bar, B_bar, Bx or h in that run are not seen.
    """

    # Channels and heads --------------------------------------------------------------------------------------

    @torch.no_grad()
    def stack_channel_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """What every channel of every mixer before `layer` adds to the residual stream.

        Parameters
        ----------
        layer
            Mixers strictly before it; -1: all.
        return_labels
            Also return "L0C0", "L0C1", ...; in Mamba-2 channel e is (head h, place p) with e = h P + p.
        incl_remainder
            Add a last component, "remainder": the rest of the stream (embedding and out_proj's biases).
        pos_slice
            Positions; an int drops the axis.
        apply_ln
            As in :meth:`decompose_resid`.
        project_output_onto
            A direction d, or several d k: return the products with them, which need d times less memory.
        """
        upto = self.layer_index(layer)
        labels = [f"L{i}C{e}" for i in self.mixer_layers(upto) for e in range(self._width(i))]
        return self._unit_results(
            1, labels, upto, incl_remainder, pos_slice, apply_ln, project_output_onto, return_labels
        )

    @torch.no_grad()
    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """What every head of every mixer before `layer` adds; arguments as :meth:`stack_channel_results`.

        Labels are "L0H0", "L0H1", ... Mamba-1 has no heads: its units are channels.
        """
        upto, P = self.layer_index(layer), self.head_width()
        labels = [f"L{i}H{h}" for i in self.mixer_layers(upto) for h in range(self._width(i) // P)]
        return self._unit_results(
            P, labels, upto, incl_remainder, pos_slice, apply_ln, project_output_onto, return_labels
        )

    @knows_options(OPTIONS, GRANTED)
    @torch.no_grad()
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_channels: bool = True,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """The residual stream entering `layer`, decomposed into its smallest parts: channels, embedding, biases.

        Parameters
        ----------
        layer
            None, -1 or n_layers: after the last block.
        mlp_input
            For compatibility with TransformerLens; True is an error, since stages of a block are not separated here.
        expand_channels
            True: one component per channel. False: one per head in Mamba-2, one per mixer in Mamba-1.
        apply_ln, pos_slice, return_labels, project_output_onto
            As in :meth:`stack_channel_results`. Branches other than mixers are one component each, such as
            "3_attn_out"; the last two components are "embed" and "bias".
        """
        if mlp_input:
            raise ValueError("mlp_input: decompose_resid decomposes the stream between two stages")
        upto = self.layer_index(layer)
        mixers = self.mixer_layers(upto)
        if not mixers:
            units, labels = self._project([], upto, apply_ln, pos_slice, project_output_onto), []
        elif expand_channels or self.model.mixer(mixers[0]).head_width is not None:
            stack_units = self.stack_channel_results if expand_channels else self.stack_head_results
            units, labels = stack_units(
                upto, True, pos_slice=pos_slice, apply_ln=apply_ln, project_output_onto=project_output_onto
            )
        else:
            ys = [
                (self.at(self.mixer_output(i), pos_slice) - self._b_out(i)) * self.out_scale(i, "mixer") for i in mixers
            ]
            labels = [f"{i}_mixer_out" for i in mixers]
            units = self._project(ys, upto, apply_ln, pos_slice, project_output_onto)
        embed = self.resid_entering(0, pos_slice)
        biases = [self._b_out(i) * self.out_scale(i, "mixer") for i in mixers] or [embed.new_zeros(embed.shape[-1])]
        bias = torch.stack(biases).sum(0).to(embed.dtype).expand_as(embed)
        whole = [(i, name) for i, name in self.writers(upto) if name != "mixer"]
        parts = [self.at(self[f"blocks.{i}.{self.model.block(i).written[name]}"], pos_slice) for i, name in whole]
        rest = self._project([*parts, embed, bias], upto, apply_ln, pos_slice, project_output_onto)
        labels += [f"{i}_{name}_out" for i, name in whole]
        stack, labels = torch.cat([units, rest.to(units.dtype)]), [*labels, "embed", "bias"]
        return (stack, labels) if return_labels else stack

    # Source positions ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def stack_source_results(
        self,
        layer: int,
        source: Source = "scan",
        pos_slice: PosSlice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Labelled:
        """One mixer's output, decomposed by the position it came from.

        dt, B, C, gates and norm scales are frozen; only values are followed. The components sum to the mixer's
        output at every target.

        Parameters
        ----------
        layer
            Which mixer.
        source
            "scan": the terms alpha[t,s] u_s. "token": what token s sends through all taps of the convolution.
        pos_slice
            Target positions; an int drops the axis. All of them together are l^2 d numbers.
        return_labels
            Also return "S0", "S1", ... (or "T0", ... for tokens) and "bias".
        incl_remainder
            Add "remainder", what came from before this call: 0 up to rounding without an initial state.
        project_output_onto
            A direction d, or several d k.

        Returns
        -------
        Tensor
            source (and bias), batch, position, d.
        """
        view, path = self.scan_view(layer), self.token_path(layer) if source == "token" else None
        if source not in ("scan", "token"):
            raise ValueError(f"source must be 'scan' or 'token', got {source!r}")
        select = self.selected(pos_slice)
        queries = _positions(select, view.length)
        output = self.model.mixer(layer).value_output()
        W, b_out = output.W.t(), output.b
        if project_output_onto is not None:
            W = W @ project_output_onto.reshape(W.shape[1], -1).to(W.dtype)
        out_of = self.model.mixer(layer).read_out(self.reader(layer))
        gain = out_of.gain[:, queries]
        P, b, l = view.width, view.batch, view.length
        n = (l + 1) * b * len(queries) * W.shape[1]
        self._check_fits(n, view.dtype, "stack_source_results", "choose targets with pos_slice")
        out = gain.new_zeros(l, b, len(queries), W.shape[1], dtype=view.dtype)
        bias = gain.new_zeros(b, len(queries), W.shape[1], dtype=view.dtype)
        step = max(1, 2**22 // (b * len(queries) * l * P))  # lanes at once, so that temporaries stay small
        for first in range(0, view.n_lanes, step):
            lanes = slice(first, first + step)
            channels = slice(first * P, (first + step) * P)
            ways = [(rearrange(view.rows(queries, lanes=lanes), "b h q s -> b q s h 1"), gain, out_of.centred)]
            if out_of.beside is not None:
                ways.append((_own_rows(ways[0][0], queries), out_of.beside[:, queries], False))
            for alpha, factor, centres in ways:
                if path is None:
                    values, constant = alpha * view.u[:, None, :, lanes], None
                else:
                    values, constant = path.split_tokens(alpha, channels, P)
                    constant = constant - constant.mean(-1, keepdim=True) if centres else constant
                    bias += (rearrange(constant, "b q h p -> b q (h p)") * factor[..., channels]) @ W[channels]
                values = values - values.mean(-1, keepdim=True) if centres else values
                values = rearrange(values, "b q s h p -> b q s (h p)") * factor[:, :, None, channels]
                out += rearrange(values @ W[channels], "b q s d -> s b q d")
        if out_of.bias is not None:
            bias = bias + out_of.bias[:, queries] @ W
        if b_out is not None:
            if project_output_onto is not None:
                b_out = b_out @ project_output_onto.reshape(len(b_out), -1).to(W.dtype)
            bias = bias + b_out
        stack = torch.cat([out, bias[None]])
        labels = [f"{'S' if source == 'scan' else 'T'}{s}" for s in range(l)] + ["bias"]
        if incl_remainder:
            whole = self._with_batch(self.mixer_output(layer))[:, queries].to(stack.dtype)
            if project_output_onto is not None:
                whole = whole @ project_output_onto.reshape(whole.shape[-1], -1).to(whole.dtype)
            stack, labels = torch.cat([stack, (whole - stack.sum(0))[None]]), [*labels, "remainder"]
        if project_output_onto is not None and project_output_onto.ndim == 1:
            stack = stack[..., 0]
        stack = stack if select.keeps_axis else stack[:, :, 0]
        stack = stack if self.has_batch_dim else stack[:, 0]
        return (stack, labels) if return_labels else stack

    # States and attention ------------------------------------------------------------------------------------

    def compute_ssm_state(
        self, layer: int | None = None, time_step: int | Sequence[int] | None = None
    ) -> Float[Tensor, "..."]:
        """The states of a mixer after each position, batch position E N (Mamba-2: batch position H P N).

        Computed in linear time by the scan itself, and differentiable in A with finite gradients.

        Parameters
        ----------
        layer
            None: all layers, stacked in front.
        time_step
            One position (its axis is dropped) or several; None: all.
        """
        if layer is None:
            return torch.stack([self.compute_ssm_state(i, time_step) for i in range(self.model.cfg.n_layers)])
        view, mixer = self.scan_view(layer), self.model.mixer(layer)
        select = self.selected(time_step, "time_step")
        queries = _positions(select, view.length)
        at = sorted(set(queries))
        states = view.out(states_at=at).states
        assert states is not None  # they were asked for
        states = states.reshape(*states.shape[:2], *mixer.memory(mixer.initial_state(1, "meta")).shape[1:])
        if queries != at:
            states = states[:, [at.index(t) for t in queries]]
        states = states if select.keeps_axis else states[:, 0]
        return states if self.has_batch_dim else states[0]

    def compute_ssm_effective_attention(
        self, layer: int | None = None, include_dt_scaling: bool = False, per_state_coord: bool = False
    ) -> Float[Tensor, "..."]:
        """The scan as a matrix, batch, channel (Mamba-2: head), target, source; without the D skip.

        With `include_dt_scaling` it multiplies x to give y_scan; without, the factor dt of the source is left out.
        It has l^2 numbers per channel; :meth:`hidden_attention` gives selected rows, channels or means.

        Parameters
        ----------
        layer
            None: all layers, stacked in front.
        per_state_coord
            Mamba-1 only: one matrix for every state, batch channel state target source; they sum to the whole.
        """
        if layer is None:
            every = range(self.model.cfg.n_layers)
            return torch.stack([self.compute_ssm_effective_attention(i, include_dt_scaling) for i in every])
        view = self.step_scan(layer)
        states = view.B.shape[-1] if per_state_coord else 1
        n = view.batch * view.n_lanes * view.length**2 * states
        self._check_fits(n, view.dtype, "compute_ssm_effective_attention", "use hidden_attention(layer, channels=)")
        if per_state_coord:
            if not view.decay_per_state:
                raise ValueError("per_state_coord: here all states of a head share one decay, as in Mamba-2")
            alphas = [view.state(n).rows(include_dt=include_dt_scaling, include_skip=False) for n in range(states)]
            alpha = torch.stack(alphas, 2)
        else:
            alpha = view.rows(include_dt=include_dt_scaling, include_skip=False)
        return alpha if self.has_batch_dim else alpha[0]

    @torch.no_grad()
    def hidden_attention(
        self,
        layer: int,
        channels: int | Sequence[int] | None = None,
        queries: PosSlice = None,
        average: bool = False,
        include_skip: bool = True,
        branch: str | None = None,
    ) -> Float[Tensor, "..."]:
        """Rows of the hidden attention: the exact weight of u_s in y_t, with D on the diagonal; for attention, its
        pattern.

        Parameters
        ----------
        layer
            Which block.
        channels
            Channels (Mamba-2 and attention: heads); an int drops the axis. None: all.
        queries
            Target positions, as a `pos_slice`; an int drops the axis. None: all.
        average
            The mean over the channels, in linear memory: no matrix per channel is built.
        include_skip
            Whether to include D on the diagonal.
        branch
            "mixer" or "attn"; None: the mixer where the block has one, else attention.

        Returns
        -------
        Tensor
            batch, channel (unless averaged), target, source.
        """
        view = self.scan_view(layer, branch)
        lanes = [channels] if isinstance(channels, int) else channels
        select = self.selected(queries, "queries")
        at = _positions(select, view.length)
        if average:
            alpha = view.mean_rows(at, lanes=lanes, include_skip=include_skip)
        else:
            n = view.batch * (view.n_lanes if lanes is None else len(lanes)) * len(at) * view.length
            self._check_fits(n, view.dtype, "hidden_attention", "choose channels or queries, or average=True")
            alpha = view.rows(at, lanes=lanes, include_skip=include_skip)
            if isinstance(channels, int):
                alpha = alpha[:, 0]
        alpha = alpha if select.keeps_axis else alpha[..., 0, :]
        return alpha if self.has_batch_dim else alpha[0]

    # The linear form -----------------------------------------------------------------------------------------

    def scan_view(self, layer: int, branch: str | None = None) -> HeldScan:
        """How one layer moves values between positions, with selection frozen at the run's values.

        Parameters
        ----------
        branch
            Which branch of the block; None: the mixer where it has one, else the first that moves values.

        Raises
        ------
        ValueError
            No branch does, or the chosen one does not; or documents are packed into the rows of this cache.
        """
        self._not_packed()
        found = self.model.block(layer).branches
        if branch is not None and branch not in found:
            raise ValueError(f"block {layer} has no branch {branch!r}; it has {', '.join(found)}")
        for name in [branch] if branch is not None else sorted(found, key=lambda name: name != "mixer"):
            scan = found[name].held_scan(self.reader(layer, name))
            if scan is not None:
                return scan
        raise ValueError(f"{branch or 'no branch'} of layer {layer} moves values between positions")

    def step_scan(self, layer: int) -> SelectiveScan:
        """The same for a kind of mixer that has step sizes dt.

        Raises
        ------
        ValueError
            This kind has none.
        """
        scan = self.scan_view(layer)
        if not isinstance(scan, SelectiveScan):
            raise ValueError(f"the mixer of layer {layer} has no step size dt")
        return scan

    def token_path(self, layer: int) -> TokenPath:
        """How tokens reach the scan of one layer, through its convolution if it has one."""
        self._not_packed()
        return self.model.mixer(layer).token_path(self.reader(layer))

    def output_gain(self, layer: int) -> Float[Tensor, "b l E"]:
        """What the scan's output is multiplied with before out_proj: the gate, and in Mamba-2 w / scale."""
        gain = self.model.mixer(layer).output_gain(self.reader(layer))
        return torch.ones_like(self.scan_view(layer).values) if gain is None else gain

    def mixer_vectors(self, layer: int, pos_slice: PosSlice = None) -> Float[Tensor, "... E"]:
        """What out_proj of one layer reads."""
        found = self.model.mixer(layer).vectors(self.reader(layer))
        return self.at(found if self.has_batch_dim else found[0], pos_slice)

    def mixer_output(self, layer: int) -> Float[Tensor, "... d"]:
        """What one layer's mixer adds to the stream."""
        return self[f"blocks.{layer}.mixer.{self.model.mixer(layer).out_site}"]

    def reader(self, layer: int, branch: str = "mixer") -> Read:
        """What this cache holds of one branch, by site name, with a batch axis."""
        return lambda name: self._with_batch(self[f"blocks.{layer}.{branch}.{name}"])

    def head_width(self) -> int:
        """Channels P of a head.

        Raises
        ------
        ValueError
            These mixers have no heads.
        """
        layers = self.mixer_layers(self.model.cfg.n_layers)
        if not layers:
            raise ValueError("no block has a mixer: give kind='attn' for the heads of attention")
        mixer = self.model.mixer(layers[0])
        if mixer.head_width is None:
            raise ValueError(f"{mixer.title} has no heads, its units are channels: use stack_channel_results")
        return mixer.head_width

    def mixer_layers(self, upto: int) -> list[int]:
        """The blocks before `upto` whose mixer writes into the stream."""
        return [i for i, name in self.writers(upto) if name == "mixer"]

    def out_scale(self, layer: int, branch: str) -> float:
        """The factor of what a branch adds to the stream."""
        return self.model.block(layer).out_scales.get(branch, 1.0)

    # Helpers -------------------------------------------------------------------------------------------------

    def _not_packed(self) -> None:
        if getattr(self, "packed", False):
            raise ValueError(
                "documents are packed into the rows of this cache, and what is recomputed from it would mix them:"
                " run each document in its own row"
            )

    def _width(self, layer: int) -> int:
        return self.model.mixer(layer).width

    def _b_out(self, layer: int) -> Tensor:
        output = self.model.mixer(layer).value_output()
        return output.W.new_zeros(output.W.shape[0]) if output.b is None else output.b

    def _with_batch(self, value: Tensor) -> Tensor:
        return value if self.has_batch_dim else value[None]

    def _unit_results(
        self,
        width: int,
        labels: list[str],
        upto: int,
        incl_remainder: bool,
        pos_slice: PosSlice,
        apply_ln: bool,
        onto: Tensor | None,
        return_labels: bool,
    ) -> Labelled:
        """Every `width` channels' y times their rows of out_proj, mixer by mixer into one stack."""
        final = self.resid_entering(upto, pos_slice)
        d = final.shape[-1]
        outputs = d if onto is None else onto.reshape(d, -1).shape[-1]
        count = len(labels) + incl_remainder
        n = count * final[..., 0].numel() * outputs
        self._check_fits(n, final.dtype, "the stack", "choose positions with pos_slice, or use project_output_onto")
        stack = final.new_zeros(count, *final.shape[:-1], outputs)
        shown, scale = self._reading(upto, apply_ln, pos_slice, onto)
        start = 0
        for i in self.mixer_layers(upto):
            y = self.mixer_vectors(i, pos_slice).to(final.dtype).unflatten(-1, (-1, width))
            w = self.model.mixer(i).value_output().W.t().to(final.dtype) * self.out_scale(i, "mixer")
            w = shown(w).unflatten(0, (-1, width))
            stack[start : start + len(w)] = torch.einsum("...uc,ucd->u...d", y, w) / scale
            start += len(w)
        if incl_remainder:
            stack[-1] = shown(final) / scale - stack[:-1].sum(0)
            labels = [*labels, "remainder"]
        stack = stack[..., 0] if onto is not None and onto.ndim == 1 else stack
        return (stack, labels) if return_labels else stack

    def _project(
        self, parts: list[Tensor], upto: int, apply_ln: bool, pos_slice: PosSlice, onto: Tensor | None
    ) -> Tensor:
        shown, scale = self._reading(upto, apply_ln, pos_slice, onto)
        if not parts:
            empty = self.resid_entering(0, pos_slice)
            return shown(empty)[None][:0]
        stack = shown(self._stack(parts)) / scale
        return stack[..., 0] if onto is not None and onto.ndim == 1 else stack

    def _reading(self, upto: int, apply_ln: bool, pos_slice: PosSlice, onto: Tensor | None):
        """(vectors -> norm's weight and projection applied, the norm's scale)."""
        norm, name = self.norm_reading(upto)
        scale: Tensor | int = 1
        if apply_ln:
            scale = self.at(self[f"{name}.hook_scale"], pos_slice)

        def shown(v: Tensor) -> Tensor:
            v = as_norm_reads(norm, v) * norm.weight.to(v.dtype) if apply_ln else v
            return v if onto is None else v @ onto.reshape(v.shape[-1], -1).to(v.dtype)

        return shown, scale

    def _check_fits(self, numbers: int, dtype: torch.dtype, what: str, advice: str) -> None:
        needed = numbers * torch.finfo(dtype).bits // 8
        free = available_bytes(self.model.device)
        if free is not None and needed > free:
            raise MemoryError(
                f"{what} would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: {advice}"
            )


def _own_rows(alpha: Float[Tensor, "b q s h 1"], queries: list[int]) -> Float[Tensor, "b q s h 1"]:
    """Rows of the same shape in which each target reads only itself."""
    own = torch.zeros_like(alpha)
    own[:, torch.arange(len(queries)), queries] = 1
    return own


def _positions(select: PositionSelect, length: int) -> list[int]:
    index = select.index(length)
    return list(range(length)) if isinstance(index, slice) else index
