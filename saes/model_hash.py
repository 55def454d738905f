"""A fingerprint of a model's weights: :mod:`hooked_mamba.model_hash`."""

from hooked_mamba.model_hash import model_hash as model_hash
