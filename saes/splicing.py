"""Running the model on coders: an SAE replaces its site, a MambaCoder its block's mixer output.

With z the latents, z' the edited ones (z' = z without edits), decode(z) the reconstruction and y the model's value:

    error=False       y' = decode(z')
    error=True        y' = y + decode(z') - decode(z)        the error y - decode(z) is kept
    error=errors      y' = decode(z') + error                the error of another pass, see :func:`misses`

With error=True a coder without edits changes nothing at all, not even by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.analysis.columns import Columns
from hooked_mamba.components import at_least_fp32
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.config import CoderConfig
from saes.naming import Coders, check_fits, named_coders, pick
from saes.renamed import renamed_in
from saes.rewriting import Rewrite, rewritten
from saes.targets import LOCAL


@dataclass(frozen=True)
class LatentEdit:
    """A change of a few latents, which costs no more than those do."""

    indices: tuple[int, ...]
    """Which ones."""
    change: Callable[[Tensor], Tensor]
    """Their values, b l k -> what is added to them."""


FeatureEdit = LatentEdit | Callable[[Tensor], Tensor]
"""An :class:`LatentEdit`, or any function of all latents, b l F -> b l F."""


@dataclass
class Spliced:
    """What `with splice(...) as spliced` gives."""

    model: HookedModel
    coders: dict[str, SparseCoder]
    latents: dict[str, Tensor] = field(default_factory=dict)
    """With record=True: each coder's latents in the last pass, edits included, b l F, attached to its graph."""


@contextmanager
def splice(
    model: HookedModel,
    coders: Coders,
    error: bool | Mapping[str, Tensor] = False,
    features: Mapping[str, FeatureEdit] | FeatureEdit | None = None,
    positions: Columns = None,
    record: bool = False,
) -> Iterator[Spliced]:
    """Replace parts of the model by coders in every forward pass inside the `with`.

    Works in `forward`, `run_with_hooks`, `run_with_cache` and `generate`. Layers run in order, so a coder reads
    the model as changed by the coders before it. Padded positions stay as they are.

    Parameters
    ----------
    model
        Its hooks are removed at the end, also after an exception.
    coders
        One, several, or several by name. A MambaCoder with target "local" replaces only the local part of its block's
        output.
    error
        True keeps each coder's error, so that only edits change anything. Errors by name, b l d_out, are those of
        another pass.
    features
        Edits of latents by coder's name; with one coder the edit alone.
    positions
        Columns to replace; None: all. See `hooked_mamba.analysis.columns.Columns` for what they mean in `generate`.
    record
        Keep the latents in `spliced.latents`.

    Raises
    ------
    ValueError
        If a coder does not fit the model, or two replace one site (with error=True they may: their changes add up).
    """
    named = named_coders(coders)
    streams = {name: check_fits(coder, model, name) for name, coder in named.items()}
    if error is not True:
        _check_apart({name: predicted for name, (_, predicted) in streams.items()})
    if not isinstance(error, bool | Mapping):
        raise TypeError(f"error must be True, False or errors by name, got {type(error).__name__}")
    if not isinstance(error, bool):
        lacking = [name for name in named if name not in error]
        if lacking:
            raise ValueError(f"error= lacks the errors of {', '.join(lacking)}; it has those of {', '.join(error)}")
    edits = _edits(named, features)
    spliced = Spliced(model, named)

    def replacing(name: str, coder: SparseCoder) -> Rewrite:
        kept = error if isinstance(error, bool) else error[name]

        def new(x: Tensor, y: Tensor) -> Tensor | None:
            out, z = _replaced(coder, x, y, kept, edits.get(name), record)
            if z is not None:
                spliced.latents[name] = z
            return out

        return Rewrite(coder.cfg, new, streams[name])

    with rewritten(model, [replacing(name, coder) for name, coder in named.items()], positions):
        yield spliced


@torch.no_grad()
def misses(model: HookedModel, coders: Coders, input: Any, **forward: Any) -> dict[str, Tensor]:
    """Each coder's error on an input, y - decode(z), b l d_out, to be frozen in `splice(error=...)`.

    Parameters
    ----------
    input, forward
        As `model(input, ...)` takes them.
    """
    named = named_coders(coders)
    streams = {name: check_fits(coder, model, name) for name, coder in named.items()}
    found: dict[str, Tensor] = {}

    def reading(name: str, coder: SparseCoder) -> Rewrite:
        def look(x: Tensor, y: Tensor) -> None:
            found[name] = at_least_fp32(y) - coder(x)

        return Rewrite(coder.cfg, look, streams[name])

    with rewritten(model, [reading(name, coder) for name, coder in named.items()]):
        model(input, return_type=None, **forward)
    return found


def decoded_change(
    coder: SparseCoder, dz: Float[Tensor, "*leading k"], indices: tuple[int, ...] | None = None
) -> Float[Tensor, "*leading d_out"]:
    """decode(z + dz) - decode(z), of all latents or of those named."""
    W = coder.W_dec if indices is None else coder.W_dec[list(indices)]
    out = dz.to(W.dtype) @ W
    return out / coder.s_out if coder.cfg.input_norm == "scale" else out


def _replaced(
    coder: SparseCoder, x: Tensor, y: Tensor, error: bool | Tensor, edit: FeatureEdit | None, record: bool
) -> tuple[Tensor | None, Tensor | None]:
    """y' (None: unchanged) and the latents, if they are recorded."""
    if edit is None and not record:
        return (None, None) if error is True else (_with_error(coder(x), error, y), None)
    z = coder.encode(x)
    if error is True and isinstance(edit, LatentEdit) and not record:  # a few latents, so a few rows of the decoder
        return _moved(y, decoded_change(coder, edit.change(z[..., list(edit.indices)]), edit.indices)), None
    edited = z if edit is None else _edited(z, edit)
    kept = edited if record else None
    if error is not True:
        return _with_error(coder.decode(edited, x), error, y), kept
    return None if edit is None else _moved(y, decoded_change(coder, edited - z)), kept


def _moved(y: Tensor, change: Tensor) -> Tensor:
    wide = at_least_fp32(y)
    return wide + change.to(wide.dtype)


def _with_error(said: Tensor, error: bool | Tensor, y: Tensor) -> Tensor:
    if isinstance(error, bool):
        return said
    if error.shape != y.shape:
        raise ValueError(f"the frozen errors are {list(error.shape)}, this pass has {list(y.shape)}")
    return said + error


def _edited(z: Tensor, edit: FeatureEdit) -> Tensor:
    if isinstance(edit, LatentEdit):
        at = list(edit.indices)
        change = edit.change(z[..., at])
        return z.index_add(-1, torch.tensor(at, device=z.device), change.to(z.dtype).expand(*z.shape[:-1], len(at)))
    new = edit(z.clone())  # a copy: an edit in place must not reach what it is compared with
    if not isinstance(new, Tensor) or new.shape != z.shape:
        got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"an edit of latents must return all of them, {list(z.shape)}; got {got}")
    return new


def _edits(
    named: Mapping[str, SparseCoder], features: Mapping[str, FeatureEdit] | FeatureEdit | None
) -> dict[str, FeatureEdit]:
    if features is None:
        return {}
    edits = {pick(named, k): v for k, v in features.items()} if isinstance(features, Mapping) else None
    if edits is None:
        edits = {pick(named, None): features}  # type: ignore[dict-item]  # no mapping, so one edit
    for name, edit in edits.items():
        if isinstance(edit, LatentEdit):
            check_features(named[name].cfg, edit.indices)
    return edits


def check_features(cfg: CoderConfig, indices: tuple[int, ...]) -> None:
    """Raise IndexError for latents that do not exist, and ValueError for one named twice."""
    for i in indices:
        if not 0 <= i < cfg.d_sae:
            raise IndexError(f"feature {i} is out of range: this coder has {cfg.d_sae}, 0 to {cfg.d_sae - 1}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"a feature is named twice: {indices}")


def _check_apart(predicted: Mapping[str, str]) -> None:
    """Two coders may not replace one site: the second would undo the first. `predicted`: coder -> its stream."""
    taken: dict[str, str] = {}
    for name, stream in predicted.items():
        site = stream.removesuffix(LOCAL)
        if site in taken:
            raise ValueError(
                f"{taken[site]} and {name} both replace {site}: splice one of them, or keep their errors (error=True)"
            )
        taken[site] = name


__getattr__ = renamed_in(__name__, {"Edit": "saes.splicing.LatentEdit"})
