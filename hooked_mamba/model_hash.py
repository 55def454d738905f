"""A fingerprint of a model's weights, by which a store and a coder record where they come from."""

from __future__ import annotations

import hashlib

from torch import Tensor

from hooked_mamba.models import HookedModel


def model_hash(model: HookedModel) -> str:
    """16 hex digits of the SHA-256 of all weights: names, shapes and values as float32.

    The same on every device, and for a checkpoint loaded in its own precision or in float32.
    """
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict_for_files().items()):
        sha.update(f"{name} {list(value.shape)}\n".encode())
        sha.update(_bytes(value))
    return sha.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    return value.detach().float().cpu().contiguous().numpy().tobytes()
