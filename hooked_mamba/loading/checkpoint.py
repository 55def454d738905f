"""Loading: from a name or a transformers model to our config and our weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading.files import open_weights, resolve
from hooked_mamba.loading.registry import FORMATS, check_family, detect, detect_folder
from hooked_mamba.loading.tables import CheckpointError, LazyState

__all__ = ["Checkpoint", "from_hf_model", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as found: nothing is read into memory until a tensor is asked for."""

    cfg: MambaConfig | Mamba2Config
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
        """The dtype of the stored embedding, by convention that of the model."""
        return self.state_dict["embed.weight"].dtype


def load_checkpoint(
    name_or_path: str | Path, family: str | None = None, revision: str | None = None
) -> Checkpoint:
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
    cfg, state = found.to_ours(config, open_weights(folder))
    name = Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else str(name_or_path)
    return Checkpoint(dataclasses.replace(cfg, model_name=name), state, found.name, folder)


def from_hf_model(hf_model: Any, family: str | None = None) -> tuple[MambaConfig | Mamba2Config, LazyState]:
    """Config and weights of a transformers model, as that object computes.

    The tensors are the model's own; :func:`~hooked_mamba.loading.weights.load_into` copies them.

    Parameters
    ----------
    hf_model
        A MambaForCausalLM, Mamba2ForCausalLM, FalconMambaForCausalLM or one of their backbones.
    family
        "mamba" or "mamba2" to refuse the other one.

    Raises
    ------
    CheckpointError
        An unsupported model, or the other family.
    """
    if not hasattr(hf_model, "config") or not hasattr(hf_model.config, "to_dict"):
        raise CheckpointError(f"expected a transformers model with a config, got {type(hf_model).__name__}")
    config = dict(hf_model.config.to_dict())
    found = detect(config)
    check_family(found.family, family, type(hf_model).__name__)
    head = getattr(hf_model, "lm_head", None)
    if head is not None:  # what the object does counts, not what its config remembers
        config["tie_word_embeddings"] = head.weight is hf_model.get_input_embeddings().weight
    cfg, state = found.to_ours(config, hf_model.state_dict())
    if isinstance(cfg, Mamba2Config) and not _norms_per_group(hf_model):
        cfg = dataclasses.replace(cfg, norm_groups=1)
    name = str(getattr(hf_model.config, "_name_or_path", "") or "custom")
    return dataclasses.replace(cfg, model_name=name), state


def _norms_per_group(hf_model: Any) -> bool:
    """Whether a Mamba-2 of transformers takes its gated norm per group (releases before 5 did not)."""
    norms = [module for module in hf_model.modules() if type(module).__name__ == "MambaRMSNormGated"]
    return all(hasattr(norm, "group_size") for norm in norms)
