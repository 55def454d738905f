"""Loading: from a name to our config and our weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_mamba.config import ModelConfig
from hooked_mamba.loading.adapters.apply import Adapter, merge_adapters
from hooked_mamba.loading.counts import check_counts
from hooked_mamba.loading.files import adapter_folder, open_weights, resolve
from hooked_mamba.loading.gguf.opened import gguf_file, open_gguf
from hooked_mamba.loading.gguf.parts import name_of_all
from hooked_mamba.loading.gguf.vocabulary import find_tokenizer
from hooked_mamba.loading.mlx import from_mlx, is_mlx, refuse_folded
from hooked_mamba.loading.quantised.read import dequantised
from hooked_mamba.loading.registry import FORMATS, check_family, detect_folder, lone_file
from hooked_mamba.loading.shapes import only_shapes
from hooked_mamba.loading.tables import CheckpointError, LazyState
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
    foreign: bool = False
    """Whether the files are another library's (GGUF, MLX), which transformers does not read as what they are."""
    own_tokenizer: Callable[[], Any] | None = None
    """What makes the tokenizer that the weights' own file holds."""

    @property
    def family(self) -> str:
        """ "mamba", "mamba2", "rwkv7" or "hybrid"."""
        return FORMATS[self.format].family

    def find_tokenizer(self) -> Any:
        """The tokenizer, where its kind is one that transformers does not read; None otherwise."""
        if self.own_tokenizer is not None:
            return self.own_tokenizer()
        find = FORMATS[self.format].find_tokenizer
        return None if find is None else find(self.folder, self.cfg.d_vocab)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored embedding (of the first tensor, if that is missing); float32 of a quantised one."""
        name = "embed.weight" if "embed.weight" in self.state_dict else next(iter(self.state_dict))
        with only_shapes():
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
        A bundled name, a local folder, `.pth` or `.gguf` file, or a hub id.
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
    packed = gguf_file(place)
    if packed is not None:
        if adapter is not None:
            raise CheckpointError(
                f"{packed}: PEFT's adapters name the tensors of Hugging Face checkpoints, which a GGUF file renames and"
                " permutes: give the adapter with the checkpoint that the GGUF file was made from"
            )
        return _from_gguf(packed, family, name_or_path)
    found, config = detect_folder(place)
    check_family(found.family, family, str(name_or_path))
    file = lone_file(place)
    weights = open_weights(place, consolidated=found.name == "codestral") if file is None else open_bin(file)
    check_counts(config, len(weights), place)
    foreign = is_mlx(config, weights)
    if foreign:
        if adapter is not None:
            refuse_folded(config, place)
        config, weights = from_mlx(config, weights)
    else:
        weights = dequantised(config, weights)
    if adapter is not None:
        tied = found.to_ours(config, weights)[0].tie_embeddings
        config, weights = merge_adapters(config, weights, adapter, adapter_folder, tied)
    cfg, state = found.to_ours(config, weights)
    folder = place if place.is_dir() else place.parent
    return Checkpoint(dataclasses.replace(cfg, model_name=_name(name_or_path)), state, found.name, folder, foreign)


def _from_gguf(path: Path, family: str | None, name_or_path: str | Path) -> Checkpoint:
    """A GGUF file, which holds config and tokenizer too."""
    architecture, keys, weights = open_gguf(path)
    found = FORMATS[f"gguf_{architecture}"]
    check_family(found.family, family, str(name_or_path))
    try:
        cfg, state = found.to_ours(keys, weights)
    except CheckpointError:
        raise
    except ValueError as error:  # of the config's own checks, which know of no file
        raise CheckpointError(f"{path}: {error}") from None
    cfg = dataclasses.replace(cfg, model_name=_name(name_or_path))
    return Checkpoint(cfg, state, found.name, path.parent, foreign=True, own_tokenizer=lambda: find_tokenizer(keys))


def _name(name_or_path: str | Path) -> str:
    name = Path(name_or_path).resolve().name if Path(name_or_path).exists() else str(name_or_path)
    return name_of_all(name).removesuffix(".pth").removesuffix(".gguf")
