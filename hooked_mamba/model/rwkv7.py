"""HookedRWKV7: RWKV-7 with a hook point at every internal site."""

from __future__ import annotations

from typing import Any, ClassVar

from hooked_mamba.components import LayerNorm
from hooked_mamba.mixers.channel_mix import ChannelMix
from hooked_mamba.mixers.rwkv7 import RWKV7Mixer
from hooked_mamba.model.hooked_model import HookedModel
from hooked_mamba.model.stack import Stages
from hooked_mamba.recurrent_config import RWKV7Config


class HookedRWKV7(HookedModel):
    """RWKV-7 (Peng et al. 2025, arXiv:2503.14456): a time mix, then a channel mix, in every block."""

    family = "rwkv7"
    config_class = RWKV7Config
    branch_classes: ClassVar = {"mixer": RWKV7Mixer, "mlp": ChannelMix}
    norm_class = LayerNorm
    norms_embedding = True

    @classmethod
    def stages(cls, cfg: Any, layer: int) -> Stages:
        return (("mixer",), ("mlp",))
