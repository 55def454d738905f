"""Counts in a config, held against the checkpoint before anything is made for each layer, head or expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooked_mamba.loading.tables import CheckpointError

__all__ = ["check_counts"]

LAYERS = ("num_hidden_layers", "n_layer", "n_layers")

SIZES = (
    "hidden_size",
    "d_model",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)

SIZE_MAX = 2**16
"""More than any published model has of these; experts may be single tensors, of which there are more."""


def check_counts(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """Refuse a config that asks for more than its files can hold.

    Parameters
    ----------
    config
        As the folder has it; what it nests for the text is looked at too.
    tensors
        Number of tensors in the files.
    folder
        For errors.

    Raises
    ------
    CheckpointError
        More layers than tensors, or a size that no model has.
    """
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for name in (*LAYERS, *SIZES):
            value, most = fields.get(name), tensors if name in LAYERS else max(tensors, SIZE_MAX)
            if isinstance(value, int) and value > most:
                why = f"more than its {tensors:,} tensors" if name in LAYERS else f"expected at most {most:,}"
                raise CheckpointError(f"the config of {folder} has {name}={value:,}: {why}")
