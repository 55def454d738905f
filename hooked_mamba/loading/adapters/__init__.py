"""Adapters: folders that PEFT wrote, merged into a checkpoint's weights before they get our names."""

from hooked_mamba.loading.adapters.apply import Adapter as Adapter
from hooked_mamba.loading.adapters.apply import merge_adapters as merge_adapters
