"""Exact attribution and circuits: contributions to a logit or a feature, traced through frozen state-space models.

Public names are in `__init__.pyi`.
"""

from __future__ import annotations

from hooked_mamba.lazy import lazy
from hooked_mamba.renamed import renamed_in

__getattr__, __all__ = lazy(__name__, __file__, renamed_in(__name__, {"Head": "circuits.targets.Channel"}))


def __dir__() -> list[str]:
    return list(__all__)
