"""hooked-mamba: look inside state-space models. `__init__.pyi` lists the public names."""

from hooked_mamba.lazy import lazy
from hooked_mamba.names_elsewhere import SAE_LENS, import_advice, module_advice
from hooked_mamba.transformerlens_names import SAELENS_TOP, TOP

__version__ = "0.1.0"

_elsewhere = import_advice(__name__, TOP, import_advice(__name__, SAELENS_TOP, library=SAE_LENS))
__getattr__, __all__ = lazy(__name__, __file__, _elsewhere)
module_advice(__name__, TOP)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
