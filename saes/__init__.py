"""Sparse autoencoders and MambaCoders: dictionaries on the internals of state-space models.

`__init__.pyi` lists the public names.
"""

from __future__ import annotations

from hooked_mamba.lazy import lazy
from saes import saelens_names
from saes.renamed import renamed_in

_renamed = renamed_in(__name__, {"Edit": "saes.splicing.LatentEdit"})


def _other(name: str) -> object:
    """Old names, and what to use for SAELens' names: an ImportError, whose text `from saes import ...` shows."""
    if name in saelens_names.TOP:
        raise ImportError(saelens_names.advice(name, saelens_names.TOP))
    return _renamed(name)


__getattr__, __all__ = lazy(__name__, __file__, _other)


def __dir__() -> list[str]:
    return list(__all__)
