"""Loading: from a name to our config and our weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_mamba.config import ModelConfig
from hooked_mamba.loading.adapters.apply import Adapter, merge_adapters
from hooked_mamba.loading.files import adapter_folder, open_weights, resolve
from hooked_mamba.loading.quantised.read import dequantised
from hooked_mamba.loading.registry import FORMATS, check_family, detect_folder, lone_file
from hooked_mamba.loading.tables import LazyState
from hooked_mamba.loading.tensor_files import open_bin

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as found: nothing is read into memory until a tensor is asked for."""

    cfg: ModelConfig
    state_dict: LazyState
    """Memory-mapped tensors under our names. The files must stay in place while it is used."""
    format: str
    """A name of :data:`~hooked_mamba.loading.registry.FORMATS`."""
    folder: Path

    @property
    def family(self) -> str:
        """ "mamba", "mamba2", "rwkv7" or "hybrid"."""
        return FORMATS[self.format].family

    def find_tokenizer(self) -> Any:
        """The tokenizer, where its kind is one that transformers does not read; None otherwise."""
        find = FORMATS[self.format].find_tokenizer
        return None if find is None else find(self.folder, self.cfg.d_vocab)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored embedding (of the first tensor, if that is missing): that of the model."""
        name = "embed.weight" if "embed.weight" in self.state_dict else next(iter(self.state_dict))
        return self.state_dict[name].dtype


def load_checkpoint(
    name_or_path: str | Path,
    family: str | None = None,
    revision: str | None = None,
    adapter: Adapter | None = None,
) -> Checkpoint:
    """Find a checkpoint and map it to our names, whatever its format.

    Parameters
    ----------
    name_or_path
        A bundled name, a local folder or `.pth` file, or a hub id.
    family
        "mamba", "mamba2", "rwkv7" or "hybrid" to refuse the others; None takes any.
    revision
        Branch, tag or commit of a hub id.
    adapter
        A folder or hub id of PEFT's with a LoRA of this checkpoint, which is merged, or several.

    Raises
    ------
    CheckpointError
        An unknown or unsupported format, the other family, damaged files, or an adapter of another kind or model.
    OSError
        The hub cannot be reached.
    """
    place = resolve(name_or_path, revision)
    found, config = detect_folder(place)
    check_family(found.family, family, str(name_or_path))
    file = lone_file(place)
    weights = open_weights(place, consolidated=found.name == "codestral") if file is None else open_bin(file)
    weights = dequantised(config, weights)
    if adapter is not None:
        tied = found.to_ours(config, weights)[0].tie_embeddings
        config, weights = merge_adapters(config, weights, adapter, adapter_folder, tied)
    cfg, state = found.to_ours(config, weights)
    name = Path(name_or_path).resolve().name if Path(name_or_path).exists() else str(name_or_path)
    folder = place if place.is_dir() else place.parent
    return Checkpoint(dataclasses.replace(cfg, model_name=name.removesuffix(".pth")), state, found.name, folder)
