"""What an intervention changes, as values: the same ones are applied to the real model and to the frozen one.

Positions are columns: an int, several, a slice, a mask b l, or None for all; see `hooked_mamba.analysis.columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor

from hooked_mamba.analysis.captured import channel_list, layer_list
from hooked_mamba.analysis.columns import Columns, kept
from hooked_mamba.frozen.places import Part, branch_of
from hooked_mamba.frozen.tokens import Source
from hooked_mamba.models import HookedModel
from hooked_mamba.renamed import renamed_in
from saes.coder import SparseCoder
from saes.naming import check_fits, default_name
from saes.splicing import check_features
from saes.steering import Amount


@dataclass(frozen=True, eq=False)
class ScaleFeature:
    """z' = factor z for one latent; its coder's error stays. 0 removes the latent."""

    coder: SparseCoder = field(repr=False)
    index: int
    positions: Columns = None
    factor: Amount = 0.0


@dataclass(frozen=True, eq=False)
class SetFeature:
    """z' = value for one latent, whatever it was; its coder's error stays."""

    coder: SparseCoder = field(repr=False)
    index: int
    value: Amount
    positions: Columns = None


@dataclass(frozen=True, eq=False)
class ScaleError:
    """A coder's error, times a factor. 0 leaves the reconstruction alone."""

    coder: SparseCoder = field(repr=False)
    positions: Columns = None
    factor: Amount = 0.0


@dataclass(frozen=True, eq=False)
class ScaleEmbedding:
    """Tokens' embeddings, times a factor."""

    positions: Columns = None
    factor: Amount = 0.0


@dataclass(frozen=True, eq=False)
class CutHead:
    """Targets no longer receive what some channels of a layer carry from some sources; dt, B and C stay."""

    layer: int
    sources: Columns
    channels: int | Sequence[int] | None = None
    """Channels e of E (in Mamba-2 e = h P + p); None: all."""
    targets: Columns = None
    source: Source = "scan"
    """"scan": the terms alpha[t,s] u_s. "token": what the tokens send through all taps of the convolution."""


@dataclass(frozen=True, eq=False)
class CutTokens:
    """Targets no longer receive what some tokens send through the mixers of some layers; dt, B and C stay."""

    sources: Columns
    targets: Columns = None
    layers: int | Iterable[int] | None = None
    source: Source = "token"


@dataclass(frozen=True, eq=False)
class ScaleUnit:
    """What one unit of a branch passes on from some positions, times a factor. 0 removes it.

    An attention head's values of these sources, for all that look at them (the pattern stays); a neuron; an expert (the
    others' weights stay); a channel of a mixer whose value decides nothing else, with all that passes beside the state;
    the value that RWKV-7's first layer hands to all others ("0.v_first", unit 0).
    """

    part: Part
    """As in "3.attn", "3.mlp", "3.moe"; of a mixer its layer's number."""
    index: int
    """Of the head, neuron, expert or channel."""
    positions: Columns = None
    factor: Amount = 0.0


@dataclass(frozen=True, eq=False)
class ScaleState:
    """h' = factor h right after some positions; the rest of the text reads h'."""

    layer: int
    positions: int | Sequence[int] | slice
    factor: float = 0.0
    channels: int | Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class SetState:
    """h' = value right after some positions, whatever it was."""

    layer: int
    positions: int | Sequence[int] | slice
    value: float | Float[Tensor, "..."]
    """One number, or a state E N (Mamba-2: H P N), or one for each row."""
    channels: int | Sequence[int] | None = None


Intervention = (
    ScaleFeature | SetFeature | ScaleError | ScaleEmbedding | ScaleUnit | CutHead | CutTokens | ScaleState | SetState
)
OfCoder = ScaleFeature | SetFeature | ScaleError
OfState = ScaleState | SetState


def checked(model: HookedModel, edits: Intervention | Iterable[Intervention]) -> list[Intervention]:
    """Edits that fit the model.

    Raises
    ------
    TypeError
        Something else than an edit.
    IndexError
        A layer, a channel or a latent that does not exist.
    ValueError
        A coder that does not fit, an unknown source, or a state's positions that cannot be counted.
    """
    return [_checked(model, edit) for edit in ([edits] if isinstance(edits, Intervention) else list(edits))]


def _checked(model: HookedModel, edit: Intervention) -> Intervention:
    if not isinstance(edit, Intervention):
        names = ", ".join(kind.__name__ for kind in get_args(Intervention))
        raise TypeError(f"expected an edit ({names}), got {type(edit).__name__}: {edit!r}")
    if isinstance(edit, CutHead | ScaleState | SetState):
        (layer,) = layer_list(model, edit.layer)
        channel_list(model, edit.channels, layer)
    if isinstance(edit, ScaleFeature | SetFeature | ScaleError):
        check_fits(edit.coder, model, default_name(edit.coder.cfg))
        if not isinstance(edit, ScaleError):
            check_features(edit.coder.cfg, (edit.index,))
    if isinstance(edit, ScaleUnit):
        _check_unit(model, edit)
    if isinstance(edit, ScaleState | SetState):
        return replace(edit, positions=counted(edit.positions))
    if not isinstance(edit, CutHead | CutTokens):
        return replace(edit, positions=kept(edit.positions))
    if edit.source not in ("scan", "token"):
        raise ValueError(f"source must be 'scan' or 'token', got {edit.source!r}")
    if isinstance(edit, CutHead):
        return replace(edit, sources=kept(edit.sources), targets=kept(edit.targets))
    layers = layer_list(model, edit.layers)
    return replace(edit, sources=kept(edit.sources), targets=kept(edit.targets), layers=layers)


def _check_unit(model: HookedModel, edit: ScaleUnit) -> None:
    layer, name = branch_of(edit.part)
    layer_list(model, layer)
    branches = model.block(layer).branches
    if any(name in branch.hands_on for branch in branches.values()):
        if edit.index:
            raise IndexError(f"unit {edit.index} of {edit.part} is out of range: it is one")
        return
    if name not in branches:
        raise ValueError(f"block {layer} has no branch {name!r}; it has {', '.join(branches)}")
    if branches[name].selection_reads == "u":
        raise ValueError(f"in layer {layer} the value itself decides what is written and read: use CutHead")
    n = n_units(branches[name])
    if not 0 <= edit.index < n:
        raise IndexError(f"unit {edit.index} of {edit.part} is out of range: it has {n}")


def n_units(branch: Any) -> int:
    """Experts, attention heads, or channels (neurons) of a branch."""
    sizes = branch.sizes()
    return int(sizes["X"]) if "X" in sizes else branch.width // branch.unit


def counted(positions: int | Iterable[int] | slice | None) -> list[int]:
    """A state's positions, which must be known before the text is there."""
    if isinstance(positions, int):
        return [positions]
    if isinstance(positions, slice):
        start, stop, step = positions.start or 0, positions.stop, positions.step or 1
        if stop is not None and min(start, stop, step) >= 0:
            return list(range(start, stop, step))
    elif positions is not None:
        return [int(t) for t in positions]
    raise ValueError(
        f"a state's positions must be an int, several, or a slice from 0 or more to an end, got {positions!r}"
    )


__getattr__ = renamed_in(__name__, {"Edit": "circuits.interventions.edits.Intervention"})
