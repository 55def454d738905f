"""The cache of a language model: activations by name, and their decompositions."""

from __future__ import annotations

from hooked_mamba.hooks.cache import HookCache
from hooked_mamba.unit_decomposition import UnitDecomposition


class ActivationCache(HookCache, UnitDecomposition):
    """Cached activations by name, and their decompositions.

    `cache["blocks.0.mixer.hook_dt"]`, `cache["dt", 0]`, `cache["resid_pre", 1]`, `cache["h.4", 2]`,
    `cache["embed"]`, `cache["scale"]` (the final norm's).

    Parameters
    ----------
    cache_dict
        Tensors by full name, b l ...; single states b E N.
    model
        The model that made them.
    has_batch_dim
        False once :meth:`remove_batch_dim` was called.
    mask
        b l, True at the real tokens of a padded batch; None where all are real.
    packed
        Whether rows hold several documents (`document_ids`); methods that recompute a scan then raise an error.
    """
