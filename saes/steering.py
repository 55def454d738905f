"""Changing latents while the model runs. The coder's error is kept: decode(z') - decode(z) is added.

Each is a context manager that works in `forward`, `run_with_cache` and `generate`, at chosen positions or all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hooked_mamba.analysis.columns import Columns
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.naming import check_fits
from saes.rewriting import Rewrite, rewritten
from saes.splicing import LatentEdit, Spliced, check_features, decoded_change, splice

Features = int | Sequence[int]
"""One latent or several."""

Amount = float | int | Tensor
"""A number, or a tensor that broadcasts against b l."""


@contextmanager
def steer(
    model: HookedModel,
    coder: SparseCoder,
    feature_id: Features,
    vector_scale: Amount | Sequence[Amount] = 1.0,
    positions: Columns = None,
) -> Iterator[HookedModel]:
    """Add `vector_scale` times a latent's decoder row to what the coder predicts: z'_f = z_f + scale.

    Parameters
    ----------
    feature_id
        Latent, or several.
    vector_scale
        How much, in units of the latent (compare with its activations, see `encode_on`); one for all or one each.
    positions
        Columns; None: all, in `generate` those of the prompt and every new one.
    """
    features = _listed(feature_id)
    check_features(coder.cfg, features)
    check_fits(coder, model, "the coder")
    scales = _one_each(vector_scale, features)

    def new(x: Tensor, y: Tensor) -> Tensor:  # needs no latents, so none are computed
        dz = _stacked(scales, y.new_zeros(*y.shape[:2], len(features), dtype=coder.W_dec.dtype))
        change = decoded_change(coder, dz, features)
        wide = torch.promote_types(y.dtype, change.dtype)
        return y.to(wide) + change.to(wide)

    with rewritten(model, [Rewrite(coder.cfg, new)], positions):
        yield model


@contextmanager
def scale_features(
    model: HookedModel, coder: SparseCoder, factors: Mapping[int, Amount], positions: Columns = None
) -> Iterator[Spliced]:
    """Multiply latents: z'_f = factor z_f.

    Parameters
    ----------
    factors
        Latent -> factor.
    positions
        Columns; None: all.
    """
    features = _listed(list(factors))
    with splice(
        model,
        coder,
        error=True,
        features=LatentEdit(features, lambda z: z * (_stacked(list(factors.values()), z) - 1)),
        positions=positions,
    ) as spliced:
        yield spliced


@contextmanager
def ablate(
    model: HookedModel, coder: SparseCoder, feature_id: Features, strength: float | int = 1.0, positions: Columns = None
) -> Iterator[HookedModel]:
    """Ablate latents: z'_f = (1 - strength) z_f.

    Parameters
    ----------
    feature_id
        Latent, or several.
    strength
        1 removes it, 0 leaves it as it is, 2 flips its sign.
    positions
        Columns; None: all.
    """
    with scale_features(model, coder, dict.fromkeys(_listed(feature_id), 1 - strength), positions):
        yield model


@contextmanager
def set_features(
    model: HookedModel, coder: SparseCoder, values: Mapping[int, Amount], positions: Columns = None
) -> Iterator[HookedModel]:
    """Set latents, whatever they were: z'_f = value.

    Parameters
    ----------
    values
        Latent -> value.
    positions
        Columns; None: all.
    """
    features = _listed(list(values))
    edit = LatentEdit(features, lambda z: _stacked(list(values.values()), z) - z)
    with splice(model, coder, error=True, features=edit, positions=positions):
        yield model


def _listed(features: Features) -> tuple[int, ...]:
    if isinstance(features, int):
        return (features,)
    listed = tuple(int(i) for i in features)
    if not listed:
        raise ValueError("no feature is given")
    return listed


def _one_each(amount: Amount | Sequence[Amount], features: Sequence[int]) -> list[Amount]:
    if isinstance(amount, float | int | Tensor):
        return [amount] * len(features)
    if len(amount) != len(features):
        raise ValueError(f"{len(features)} features and {len(amount)} scales: give one for all, or one each")
    return list(amount)


def _stacked(amounts: Sequence[Amount], like: Tensor) -> Tensor:
    """Amounts side by side, b l k, as `like` has them."""
    columns = [torch.as_tensor(a, dtype=like.dtype, device=like.device).expand(like.shape[:-1]) for a in amounts]
    return torch.stack(columns, -1)
