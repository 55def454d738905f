"""To and from a model object of transformers, which is imported only when one is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading.registry import check_family, detect, format_for
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.weights import Shape, check_shapes

__all__ = ["from_hf_model", "to_hf_model"]


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
    name = Path(name).name if Path(name).is_dir() else name  # a hub id stays, a folder's place is nobody's business
    return dataclasses.replace(cfg, model_name=name), state


def _norms_per_group(hf_model: Any) -> bool:
    """Whether a Mamba-2 of transformers takes its gated norm per group (releases before 5 did not)."""
    norms = [module for module in hf_model.modules() if type(module).__name__ == "MambaRMSNormGated"]
    return all(hasattr(norm, "group_size") for norm in norms)


def to_hf_model(
    cfg: MambaConfig | Mamba2Config, state_dict: Mapping[str, Tensor], shapes: Mapping[str, Shape] | None = None
) -> Any:
    """A transformers model of this config with a copy of these weights, each in its own dtype.

    Returns
    -------
    Module
        A MambaForCausalLM, FalconMambaForCausalLM or Mamba2ForCausalLM in evaluation mode; tied embeddings are one
        parameter.

    Raises
    ------
    CheckpointError
        Weights that are not those of `shapes`, or what the installed transformers cannot express.
    """
    import transformers

    if shapes is not None:  # None: they are the model's own
        check_shapes(shapes, state_dict)
    # Which groups the gated norm has is up to the installed release: looked at once the model stands.
    writable = dataclasses.replace(cfg, norm_groups=cfg.n_groups) if isinstance(cfg, Mamba2Config) else cfg
    config, state = format_for(cfg, "hf").from_ours(writable, state_dict)
    model_class = getattr(transformers, config["architectures"][0])
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        hf_model = model_class(model_class.config_class(**fields))
    if isinstance(cfg, Mamba2Config):
        groups = cfg.n_groups if _norms_per_group(hf_model) else 1
        if cfg.norm_groups != groups:
            raise CheckpointError(
                f"transformers {transformers.__version__} takes the gated norm in {groups} groups for "
                f"n_groups={cfg.n_groups}; expected norm_groups={groups}, got {cfg.norm_groups}"
            )
    weights = {name: state[name].detach().clone() for name in state}
    if cfg.tie_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    hf_model.load_state_dict(weights, strict=True, assign=True)
    hf_model.tie_weights()
    _fill_dummies(hf_model, weights["backbone.embeddings.weight"])
    stored = weights["backbone.embeddings.weight"].dtype
    setattr(hf_model.config, "dtype" if hasattr(hf_model.config, "dtype") else "torch_dtype", stored)
    return hf_model.eval()


def _fill_dummies(hf_model: torch.nn.Module, like: Tensor) -> None:
    """Falcon-Mamba keeps ones for a kernel that asks for weights of its weightless norms; no file has them."""
    for module in hf_model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.ones(buffer.shape, dtype=like.dtype, device=like.device))
