"""Sparse autoencoders and MambaCoders: dictionaries on the internals of state-space models.

`__init__.pyi` lists the public names.
"""

from __future__ import annotations

from hooked_mamba.lazy import lazy
from hooked_mamba.names_elsewhere import SAE_LENS, import_advice, module_advice
from saes import saelens_names
from saes.renamed import renamed_in

_renamed = renamed_in(__name__, {"Edit": "saes.splicing.LatentEdit"})
_elsewhere = {**saelens_names.TOP, **saelens_names.MODULES}
__getattr__, __all__ = lazy(__name__, __file__, import_advice(__name__, _elsewhere, _renamed, SAE_LENS))
module_advice(__name__, _elsewhere, SAE_LENS)


def __dir__() -> list[str]:
    return list(__all__)
