"""What `import hooked_mamba` offers."""

from hooked_mamba.activation_cache import ActivationCache as ActivationCache
from hooked_mamba.config import Mamba2Config as Mamba2Config
from hooked_mamba.config import MambaConfig as MambaConfig
from hooked_mamba.factored_matrix import FactoredMatrix as FactoredMatrix
from hooked_mamba.hooks.points import HookPoint as HookPoint
from hooked_mamba.hooks.root import HookedRootModule as HookedRootModule
from hooked_mamba.models import HookedDeltaNet as HookedDeltaNet
from hooked_mamba.models import HookedHybrid as HookedHybrid
from hooked_mamba.models import HookedMamba as HookedMamba
from hooked_mamba.models import HookedMamba2 as HookedMamba2
from hooked_mamba.models import HookedMamba3 as HookedMamba3
from hooked_mamba.models import HookedModel as HookedModel
from hooked_mamba.models import HookedRWKV7 as HookedRWKV7
from hooked_mamba.models import load_model as load_model
from hooked_mamba.state import LayerState as LayerState
from hooked_mamba.state import ModelState as ModelState

__version__: str
