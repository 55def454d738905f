"""What a tensor becomes in a number format, and what may not be lost by it."""

from __future__ import annotations

import torch
from torch import Tensor

from saes.files.checks import STORED, CoderFileError, not_finite

MATRIX, LATENT = 0.05, 0.5
"""Shares of a matrix' norm, and of a latent's in it, that rounding to float8 may miss."""

LATENTS = {"W_enc": 1, "W_dec": 0}
"""Axis along which a matrix has its latents."""


def rounded(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """A coder's tensor as it is stored: matrices in the format, biases and thresholds at least in float32.

    Raises
    ------
    CoderFileError
        For numbers that are not finite, too large for the format, or too small for float8.
    """
    wanted = STORED[dtype]
    if wanted.itemsize <= 2 and not name.startswith("W_"):
        wanted = torch.float32
    if tensor.itemsize == 1:
        tensor = tensor.float()
    if not_finite(tensor):
        raise CoderFileError(f"{name} holds numbers that are not finite; such a coder is not written")
    out, limit, most = tensor.to(wanted).contiguous(), torch.finfo(wanted).max, float(tensor.abs().max())
    if not_finite(out) or (wanted.itemsize == 1 and most > limit):  # float8 has no infinity, and may stop at its limit
        form = str(wanted).removeprefix("torch.")
        other = "bfloat16" if wanted.itemsize <= 2 else "float64"
        raise CoderFileError(f"{name} has numbers up to {most:g}, beyond {form}'s {limit:g}; use {other}")
    if wanted.itemsize == 1 and most > 0:
        _check_small(tensor / most, out.to(tensor.dtype) / most, dtype, name)
    return out


def _check_small(tensor: Tensor, out: Tensor, dtype: str, name: str) -> None:
    """Refuse a matrix, of numbers up to 1, many of whose numbers are too small for a format."""
    missed = float((out - tensor).norm() / tensor.norm())
    if missed > MATRIX:
        raise CoderFileError(
            f"rounding {name} to {dtype} would miss {missed:.1%} of its norm (at most {MATRIX:.0%}): many of its"
            " numbers are too small for that format; use float16 or bfloat16"
        )
    if name in LATENTS:
        other = 1 - LATENTS[name]
        norms = tensor.norm(dim=other)
        lost = int(((out - tensor).norm(dim=other) > LATENT * norms).sum())
        if lost:
            raise CoderFileError(
                f"rounding {name} to {dtype} would take most of {lost:,} of {len(norms):,} latents, whose numbers are"
                " too small for that format; use float16 or bfloat16"
            )
