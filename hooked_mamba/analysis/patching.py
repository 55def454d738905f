"""Activation patching: how much each activation of a clean run restores in a corrupted one.

TransformerLens' names and arguments; a sweep runs its patches side by side (see `patch_runs`). Axis names of an index:

    layer, pos       block, position
    channel, head    the axis behind the positions: channels in Mamba-1 (and wherever a site is b l E), heads
    state            the N states (of sites that have them last)

The site "h" with a position index means the state right after that position, which is carried forward
(`hook_h.{t}`); its clean values are computed from the clean cache's x, dt and B where the cache does not hold them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.analysis.patch_runs import Metric, Patch, run_patches
from hooked_mamba.analysis.patch_setters import (
    AT_ONE_POSITION,
    PatchSetter,
    layer_head_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    layer_pos_state_dim_patch_setter,
    layer_pos_state_patch_setter,
)
from hooked_mamba.analysis.patch_setters import (
    layer_head_pos_pattern_patch_setter as layer_head_pos_pattern_patch_setter,
)
from hooked_mamba.hooks.names import split_state_point
from hooked_mamba.hooks.site import PlacedSite
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.state import Padding
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS

STATE_SITE = "h"


@knows_options(OPTIONS, GRANTED)
def generic_activation_patch(
    model: Any,
    corrupted_tokens: Int[Tensor, "b l"] | str | Sequence[str],
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    progress: bool = True,
    return_figure: bool = False,
    positions: Sequence[int] | None = None,
) -> Any:
    """Patch one activation at a time and measure the metric.

    Parameters
    ----------
    model, corrupted_tokens
        The model and the prompts to patch into, text or tokens.
    clean_cache
        Cache of the clean run, of the same shape.
    patching_metric
        From logits b l V to one number (or one per row, which gives the result a last axis of rows).
    patch_setter
        How to patch; the index follows the order of the axis names, layer first.
    activation_name
        Short name of the site, such as "resid_pre".
    index_axis_names
        Axes to sweep completely, "layer" first.
    index_df
        Instead of whole axes: the indices themselves, a DataFrame or a list of tuples.
    return_index_df
        Also return the list of indices.
    attention_mask
        For padded prompts.
    batch_size
        Rows of one forward pass.
    progress
        Whether to show a bar.
    positions
        Columns of the logits that the metric reads, such as (-1,); None: found automatically. Elsewhere the metric sees
        NaN.
    return_figure
        Also return a plotly heat map (of the first two axes; further ones are averaged).

    Returns
    -------
    Tensor
        One axis per index axis; with `index_df` one element per index; NaN in blocks without the site. A tuple if more
        was asked for.
    """
    tokens, found = model.input_to_tokens(corrupted_tokens)
    attention_mask = found if attention_mask is None else attention_mask
    indices, shape = index_list(model, tokens.shape[1], activation_name, index_axis_names, index_df)
    indices = [
        from_start(index, index_axis_names, model.cfg.n_layers, tokens.shape, attention_mask) for index in indices
    ]
    clean = CleanValues(model, clean_cache, activation_name, tokens.shape, index_axis_names)

    def patch_at(index: tuple[int, ...]) -> Patch:
        def edit(value: Tensor, first: int = 0) -> Tensor:
            here = clean.from_column(index, first)
            try:
                return patch_setter(value, here, clean.value(index)[:, first:].to(value))
            except IndexError as error:
                raise IndexError(
                    f"the patch setter cannot use index {index} ({', '.join(clean.axes)}) in {clean.site(index)}, whose"
                    f" value is {list(value.shape)}: {error}"
                ) from error

        return Patch(clean.site(index), edit, clean.column(index) if patch_setter in AT_ONE_POSITION else None)

    there = [i for i, index in enumerate(indices) if clean.is_there(index)]
    values = run_patches(
        model,
        tokens,
        [patch_at(indices[i]) for i in there],
        patching_metric,
        attention_mask,
        batch_size,
        progress,
        f"patching {activation_name}",
        positions,
    )
    if len(there) < len(indices):  # blocks without this site have nothing to patch
        values, found_ones = values.new_full((len(indices), *values.shape[1:]), torch.nan), values
        values[there] = found_ones
    result = values if shape is None else values.reshape(*shape, *values.shape[1:])
    extras: list[Any] = [indices] if return_index_df else []
    if return_figure:
        from hooked_mamba.analysis.plots import patching_figure

        extras.append(patching_figure(result, index_axis_names or ("index",), activation_name, model, tokens))
    return (result, *extras) if extras else result


def index_list(
    model: Any, length: int, name: str, axes: Sequence[str] | None, index_df: Any
) -> tuple[list[tuple[int, ...]], tuple[int, ...] | None]:
    """The indices, and the shape of the result where they are whole axes."""
    if index_df is not None:
        rows = index_df.itertuples(index=False) if hasattr(index_df, "itertuples") else index_df
        indices = [tuple(int(i) for i in row) for row in rows]
        return indices, None
    if not axes:
        raise ValueError("give index_axis_names, such as ('layer', 'pos'), or the indices themselves as index_df")
    if axes[0] != "layer":
        raise ValueError(f"the first index axis must be 'layer', got {axes[0]!r}")
    site = placed_site(model, "h.0" if name == STATE_SITE and "pos" in axes else name)  # says if there is none
    units = unit_axes(model)
    for axis in axes[1:]:
        if axis != "pos" and UNITS.get(axis, axis) not in units:
            known = ["layer", "pos", *units, *(name for name, same in UNITS.items() if same in units)]
            raise ValueError(f"no index axis is named {axis!r} in this model; there are {', '.join(known)}")
    sizes = {"layer": model.cfg.n_layers, "pos": length}
    for axis in axes:
        unit = UNITS.get(axis, axis)
        if unit in site.axes:
            sizes[axis] = site.shape(1, length)[site.axes[unit]]
        elif axis not in sizes:
            raise ValueError(
                f"the site {name!r} is {site.row.shape!r} in this model and has no axis {axis!r};"
                f" it has {', '.join(site.axes) or 'no units'}. Other indices, for a setter of your own, go in"
                " as index_df"
            )
    shape = tuple(sizes[axis] for axis in axes)
    return list(itertools.product(*map(range, shape))), shape


def from_start(
    index: tuple[int, ...],
    axes: Sequence[str] | None,
    n_layers: int,
    shape: Sequence[int],
    attention_mask: Any,
) -> tuple[int, ...]:
    """An index whose negative layer counts from the last, and whose negative position from the rows' last real tokens.

    Raises
    ------
    IndexError
        A layer that the model does not have.
    ValueError
        A negative position in rows that end at different columns, where no single column stands for it; or without axis
        names, so that it is unknown which number is the position.
    """
    layer, *rest = index
    if not -n_layers <= layer < n_layers:
        raise IndexError(f"index {index}: layer {layer} is out of range for a model of {n_layers} layers")
    places = [i for i, axis in enumerate(axes[1:]) if axis == "pos"] if axes else list(range(len(rest)))
    ends = {shape[1]}
    if attention_mask is not None:
        padding = Padding.from_mask(attention_mask, shape)
        ends = ends if padding is None else set(padding.ends.tolist())
    for i in (i for i in places if rest[i] < 0):
        if not axes and len(ends) > 1:
            raise ValueError(f"index {index}: name the axes (index_axis_names) of negative indices in a padded batch")
        if len(ends) > 1:
            raise ValueError(
                f"index {index}: the rows are padded on the right and end at different columns, so that no column is"
                f" position {rest[i]} of all: pad on the left (padding_side='left'), or give columns from 0 up"
            )
        if axes:
            rest[i] += ends.copy().pop()
    return (layer % n_layers, *rest)


UNITS = {"head_index": "head"}
"""Other names of index axes: TransformerLens' -> ours."""


def unit_axes(model: Any) -> list[str]:
    """The axes of channels, heads, states and so on that any site of the model has."""
    sites = [point.site for point in model.hook_dict.values() if point.site is not None]
    return list(dict.fromkeys(axis for site in sites for axis in site.axes))


def placed_site(model: Any, name: str) -> PlacedSite:
    """What the first block with a site of this short name declares about it."""
    layers = range(model.cfg.n_layers)
    names = [model.act_name(name, layer) for layer in layers]
    base = [split_state_point(full) or (full, 0) for full in names]
    found = next((i for i in layers if base[i][0] in model.hook_dict), 0)
    return model.site(names[found])


class CleanValues:
    """Where a patch goes and what the clean run had there."""

    def __init__(
        self, model: Any, cache: ActivationCache, name: str, shape: Sequence[int], axes: Sequence[str] | None
    ) -> None:
        self.model, self.cache, self.name, self.shape = model, cache, name, tuple(shape)
        self.axes = tuple(axes) if axes else ("layer", "pos")
        self.by_state = name == STATE_SITE and "pos" in self.axes
        self._states: tuple[int, Tensor] | None = None
        self.act_name, self.placed = lru_cache(None)(model.act_name), lru_cache(None)(model.site)

    def site(self, index: Sequence[int]) -> str:
        """Full name of the patched site."""
        if self.by_state:
            return self.act_name(f"h.{index[self.axes.index('pos')]}", index[0])
        return self.act_name(self.name, index[0])

    def column(self, index: Sequence[int]) -> int | None:
        """The column that an index names; None where it names none, or one from the end."""
        if self.by_state or "pos" not in self.axes or self.placed(self.site(index)).row.position_axis != 1:
            return None
        column = index[self.axes.index("pos")]
        return column if 0 <= column < self.shape[1] else None

    def from_column(self, index: tuple[int, ...], first: int) -> tuple[int, ...]:
        """An index counted from column `first`, for passes that start there."""
        if not first:
            return index
        place = self.axes.index("pos")
        return (*index[:place], index[place] - first, *index[place + 1 :])

    def is_there(self, index: Sequence[int]) -> bool:
        """Whether the block has the site; False for all but a few blocks of a hybrid."""
        full = self.site(index)
        base = (split_state_point(full) or (full, 0))[0]
        if base in self.model.hook_dict:
            return True
        if any(SiteName.parse(name).hook == SiteName.parse(base).hook for name in self.model.hook_dict):
            return False
        self.model.site(full)  # raises: no block has it
        return False

    def value(self, index: Sequence[int]) -> Tensor:
        """The clean activation there, with its batch axis."""
        if self.by_state:
            return self.states(index[0])[:, index[self.axes.index("pos")]]
        value = self.cache[self.name, index[0]]
        value = value if self.cache.has_batch_dim else value[None]
        axis = self.placed(self.site(index)).row.position_axis
        found = (value.shape[0], value.shape[axis])
        if found != self.shape:
            raise ValueError(
                f"the clean run is {list(found)} (batch, position) and the corrupted one {list(self.shape)};"
                " patching needs prompts of the same length"
            )
        return value

    def states(self, layer: int) -> Tensor:
        """All clean states of a layer; only the most recent layer's are kept, since sweeps go layer by layer."""
        if self._states is None or self._states[0] != layer:
            with torch.no_grad():
                states = self.cache.compute_ssm_state(layer)
            self._states = layer, states if self.cache.has_batch_dim else states[None]
        if tuple(self._states[1].shape[:2]) != self.shape:
            raise ValueError(
                f"the clean run is {list(self._states[1].shape[:2])} (batch, position) and the corrupted one"
                f" {list(self.shape)}; patching needs prompts of the same length"
            )
        return self._states[1]


# Ready-made sweeps -------------------------------------------------------------------------------------------


def _sweep(name: str, axes: tuple[str, ...], setter: PatchSetter, text: str) -> partial:
    sweep = partial(generic_activation_patch, patch_setter=setter, activation_name=name, index_axis_names=axes)
    sweep.__doc__ = f"""{text}: {" x ".join(axes)}.

    Called as sweep(model, corrupted_tokens, clean_cache, patching_metric); see :func:`generic_activation_patch`.
    """
    return sweep


def _by_pos(name: str, text: str) -> partial:
    return _sweep(name, ("layer", "pos"), layer_pos_patch_setter, text)


get_act_patch_resid_pre = _by_pos("resid_pre", "The residual stream entering each block")
get_act_patch_resid_post = _by_pos("resid_post", "The residual stream leaving each block")
get_act_patch_in_proj = _by_pos("in_proj", "The whole input projection")
get_act_patch_x_pre = _by_pos("x_pre", "The convolution's input")
get_act_patch_gate_pre = _by_pos("mixer.z", "The mixer's gate branch, before SiLU")
get_act_patch_conv = _by_pos("conv", "The convolution's output")
get_act_patch_x = _by_pos("x", "The scan's input")
get_act_patch_x_proj = _by_pos("x_proj", "Low-rank dt, B and C together (Mamba-1)")
get_act_patch_dt = _by_pos("dt", "The step size")
get_act_patch_B = _by_pos("B", "The input selection")
get_act_patch_C = _by_pos("C", "The output selection")
get_act_patch_y_scan = _by_pos("y_scan", "What is read from the state")
get_act_patch_skip = _by_pos("skip", "The D skip")
get_act_patch_y = _by_pos("y", "The scan's output with the skip")
get_act_patch_gate = _by_pos("gate", "The gate")
get_act_patch_y_gated = _by_pos("y_gated", "The gated output")
get_act_patch_out_proj = _by_pos("out_proj", "The mixer's output into the residual stream")

get_act_patch_channel_all_pos = _sweep(
    "y_gated", ("layer", "channel"), layer_head_vector_patch_setter, "Each channel's gated output at all positions"
)
get_act_patch_head_out_all_pos = _sweep(
    "y", ("layer", "head"), layer_head_vector_patch_setter, "Each Mamba-2 head's output at all positions"
)
get_act_patch_head_out_by_pos = _sweep(
    "y", ("layer", "pos", "head"), layer_pos_head_vector_patch_setter, "Each Mamba-2 head's output by position"
)
get_act_patch_state = _sweep(
    STATE_SITE,
    ("layer", "pos"),
    layer_pos_state_patch_setter,
    "The state after each position, carried forward",
)
get_act_patch_state_dim = _sweep(
    STATE_SITE, ("layer", "pos", "state"), layer_pos_state_dim_patch_setter, "One of the N states after each position"
)

# Attention, MLPs and experts, over the blocks that have them; names as in TransformerLens where it has them


def _of_heads_by_pos(name: str, axis: str, text: str) -> partial:
    return _sweep(name, ("layer", "pos", axis), layer_pos_head_vector_patch_setter, f"{text}, by position")


def _of_heads(name: str, axis: str, text: str) -> partial:
    return _sweep(name, ("layer", axis), layer_head_vector_patch_setter, f"{text}, at all positions")


get_act_patch_attn_out = _by_pos("attn_out", "What attention adds to the stream")
get_act_patch_mlp_out = _by_pos("mlp_out", "What the MLP adds to the stream")
get_act_patch_moe_out = _by_pos("moe_out", "What the experts add to the stream")
get_act_patch_mixer_out = _by_pos("mixer_out", "What the mixer adds to the stream of a hybrid")
get_act_patch_resid_mid = _by_pos("resid_mid", "The residual stream between two stages")
get_act_patch_attn_head_out_by_pos = _of_heads_by_pos("attn.z", "head", "Each head's output")
get_act_patch_attn_head_out_all_pos = _of_heads("attn.z", "head", "Each head's output")
get_act_patch_attn_head_z_by_pos = _of_heads_by_pos("attn.z", "head", "Each head's mixed values")
get_act_patch_attn_head_z_all_pos = _of_heads("attn.z", "head", "Each head's mixed values")
get_act_patch_attn_head_q_by_pos = _of_heads_by_pos("q", "head", "Each head's queries")
get_act_patch_attn_head_q_all_pos = _of_heads("q", "head", "Each head's queries")
get_act_patch_attn_head_k_by_pos = _of_heads_by_pos("k", "key_value_head", "Each key-value head's keys")
get_act_patch_attn_head_k_all_pos = _of_heads("k", "key_value_head", "Each key-value head's keys")
get_act_patch_attn_head_v_by_pos = _of_heads_by_pos("v", "key_value_head", "Each key-value head's values")
get_act_patch_attn_head_v_all_pos = _of_heads("v", "key_value_head", "Each key-value head's values")
get_act_patch_attn_head_pattern_all_pos = _sweep(
    "pattern", ("layer", "head"), layer_head_pattern_patch_setter, "Each head's pattern, for all positions"
)
get_act_patch_attn_head_pattern_by_pos = _sweep(
    "pattern", ("layer", "head", "pos"), layer_head_pos_pattern_patch_setter, "Each head's pattern, row by row"
)
get_act_patch_neuron_by_pos = _of_heads_by_pos("post", "neuron", "Each neuron of the MLPs")
get_act_patch_neuron_all_pos = _of_heads("post", "neuron", "Each neuron of the MLPs")
get_act_patch_expert_score_by_pos = _of_heads_by_pos("router_scores", "expert", "Each expert's score in the choice")
get_act_patch_expert_score_all_pos = _of_heads("router_scores", "expert", "Each expert's score in the choice")

SMALL_SITES = ("resid_pre", "x_pre", "mixer.z", "conv", "x", "dt", "B", "C", "y_scan", "skip", "gate", "out_proj")
"""The sites of :func:`get_act_patch_site_every`, which both families have."""


def get_act_patch_site_every(
    model: Any,
    corrupted_tokens: Int[Tensor, "b l"] | str | Sequence[str],
    clean_cache: ActivationCache,
    metric: Metric,
    sites: Sequence[str] = SMALL_SITES,
    **options: Any,
) -> Tensor:
    """Layer x position sweeps of several sites, stacked in front: site layer pos."""
    sweeps = [_by_pos(site, site) for site in sites]
    return torch.stack([sweep(model, corrupted_tokens, clean_cache, metric, **options) for sweep in sweeps])


def get_act_patch_attn_head_all_pos_every(
    model: Any,
    corrupted_tokens: Int[Tensor, "b l"] | str | Sequence[str],
    clean_cache: ActivationCache,
    metric: Metric,
    **options: Any,
) -> Tensor:
    """Attention heads' output, queries, keys, values and patterns at all positions: 5 layer head. NaN where there are
    fewer heads of keys and values than of queries."""
    sweeps = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return _stacked([sweep(model, corrupted_tokens, clean_cache, metric, **options) for sweep in sweeps])


def get_act_patch_attn_head_by_pos_every(
    model: Any,
    corrupted_tokens: Int[Tensor, "b l"] | str | Sequence[str],
    clean_cache: ActivationCache,
    metric: Metric,
    **options: Any,
) -> Tensor:
    """The same by position, 5 layer pos head."""
    sweeps = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_head_pattern_by_pos,
    )
    results = [sweep(model, corrupted_tokens, clean_cache, metric, **options) for sweep in sweeps]
    return _stacked([*results[:-1], results[-1].transpose(1, 2)])


def _stacked(results: Sequence[Tensor]) -> Tensor:
    """Results whose last axes may differ in length, padded with NaN."""
    heads = max(found.shape[-1] for found in results)
    return torch.stack([F.pad(found, (0, heads - found.shape[-1]), value=torch.nan) for found in results])


def get_act_patch_block_every(
    model: Any,
    corrupted_tokens: Int[Tensor, "b l"] | str | Sequence[str],
    clean_cache: ActivationCache,
    metric: Metric,
    **options: Any,
) -> Tensor:
    """Residual stream and mixer output by position, 2 layer pos (TransformerLens has a third for MLPs)."""
    return get_act_patch_site_every(model, corrupted_tokens, clean_cache, metric, ("resid_pre", "out_proj"), **options)
