"""The models with one mixer per block: thin subclasses of one stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from hooked_mamba import loading
from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.mixers.mamba1 import Mamba1Mixer
from hooked_mamba.mixers.mamba2 import Mamba2Mixer
from hooked_mamba.model.hooked_model import MODELS, HookedModel
from hooked_mamba.model.hybrid import HookedDeltaNet as HookedDeltaNet
from hooked_mamba.model.hybrid import HookedHybrid as HookedHybrid
from hooked_mamba.model.hybrid import HookedMamba3 as HookedMamba3
from hooked_mamba.model.rwkv7 import HookedRWKV7 as HookedRWKV7
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS


class HookedMamba(HookedModel):
    """Mamba-1 (and Falcon-Mamba) with a hook point at every internal site."""

    family = "mamba"
    config_class = MambaConfig
    branch_classes: ClassVar = {"mixer": Mamba1Mixer}


class HookedMamba2(HookedModel):
    """Mamba-2 (and Codestral-Mamba) with a hook point at every internal site."""

    family = "mamba2"
    config_class = Mamba2Config
    branch_classes: ClassVar = {"mixer": Mamba2Mixer}


@knows_options(OPTIONS, GRANTED)
def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    device_map: Any = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
) -> HookedModel:
    """The model of a bundled name, a folder or a hub id, of the class that its files call for.

    Parameters
    ----------
    name_or_path, revision, dtype, device, tokenizer, device_map, adapter
        As in :meth:`HookedModel.from_pretrained`. Each file is opened once.

    Raises
    ------
    CheckpointError
        An unknown or unsupported format, damaged files, or an adapter of another kind or model.
    OSError
        The hub cannot be reached.
    """
    checkpoint = loading.load_checkpoint(name_or_path, revision=revision, adapter=adapter)
    return MODELS[checkpoint.family].from_checkpoint(
        checkpoint, dtype=dtype, device=device, tokenizer=tokenizer, device_map=device_map
    )
