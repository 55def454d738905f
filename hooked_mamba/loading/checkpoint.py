"""Loading: from a name to our config and our weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from hooked_mamba.config import ModelConfig
from hooked_mamba.loading.files import open_weights, resolve
from hooked_mamba.loading.registry import FORMATS, check_family, detect_folder
from hooked_mamba.loading.tables import LazyState

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
        """ "mamba" or "mamba2"."""
        return FORMATS[self.format].family

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored embedding (of the first tensor, if that is missing): that of the model."""
        name = "embed.weight" if "embed.weight" in self.state_dict else next(iter(self.state_dict))
        return self.state_dict[name].dtype


def load_checkpoint(name_or_path: str | Path, family: str | None = None, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and map it to our names, whatever its format.

    Parameters
    ----------
    name_or_path
        A bundled name, a local folder or a hub id.
    family
        "mamba" or "mamba2" to refuse the other one; None takes either.
    revision
        Branch, tag or commit of a hub id.

    Raises
    ------
    CheckpointError
        An unknown or unsupported format, the other family, or damaged files.
    OSError
        The hub cannot be reached.
    """
    folder = resolve(name_or_path, revision)
    found, config = detect_folder(folder)
    check_family(found.family, family, str(name_or_path))
    cfg, state = found.to_ours(config, open_weights(folder, consolidated=found.name == "codestral"))
    name = Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else str(name_or_path)
    return Checkpoint(dataclasses.replace(cfg, model_name=name), state, found.name, folder)
