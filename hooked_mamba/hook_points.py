"""The module in which TransformerLens keeps its hook points: `from hooked_mamba.hook_points import HookPoint`."""

from hooked_mamba.hooks.points import HookPoint as HookPoint
from hooked_mamba.hooks.root import HookedRootModule as HookedRootModule
