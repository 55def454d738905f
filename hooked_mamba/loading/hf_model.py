"""To and from a model object of transformers, which is imported only when one is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hooked_mamba.config import Mamba2Config, ModelConfig
from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading.live import refuse_wrapped
from hooked_mamba.loading.registry import check_family, detect, format_for
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.weights import Shape, check_shapes

__all__ = ["from_hf_model", "to_hf_model"]


def from_hf_model(hf_model: Any, family: str | None = None) -> tuple[ModelConfig, LazyState]:
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
        An unsupported model, the other family, or one with adapters, compiled or quantised.
    """
    refuse_wrapped(hf_model)
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
    if isinstance(cfg, HybridConfig):
        cfg = _with_step_limit(cfg, hf_model)
    name = str(getattr(hf_model.config, "_name_or_path", "") or "custom")
    name = Path(name).name if Path(name).is_dir() else name  # a hub id stays, a folder's place is nobody's business
    return dataclasses.replace(cfg, model_name=name), state


def _norms_per_group(hf_model: Any) -> bool:
    """Whether a Mamba-2 of transformers takes its gated norm per group (releases before 5 did not)."""
    norms = [module for module in hf_model.modules() if type(module).__name__ == "MambaRMSNormGated"]
    return all(hasattr(norm, "group_size") for norm in norms)


def _with_step_limit(cfg: HybridConfig, hf_model: Any) -> HybridConfig:
    """The config with the clamp of dt that the object applies: some classes clamp by another field than files state."""
    found = next((m.time_step_limit for m in hf_model.modules() if hasattr(m, "time_step_limit")), None)
    mixer = cfg.branches.get("mixer")
    if found is None or not isinstance(mixer, Mamba2Config):
        return cfg
    return dataclasses.replace(
        cfg, branches={**cfg.branches, "mixer": dataclasses.replace(mixer, dt_limit=tuple(found))}
    )


def to_hf_model(cfg: ModelConfig, state_dict: Mapping[str, Tensor], shapes: Mapping[str, Shape] | None = None) -> Any:
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
    form = format_for(cfg, "hf")
    config, state = form.from_ours(writable, state_dict)
    model_class = getattr(transformers, config["architectures"][0], None)
    if model_class is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no {config['architectures'][0]}; write files with"
            " save_pretrained, which the package that defines it reads"
        )
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with parameters_on_meta():
        hf_model = model_class(model_class.config_class(**fields))
    if isinstance(cfg, HybridConfig):  # a model object may merge what files hold apart
        state = form.from_ours(cfg, state_dict, set(hf_model.state_dict()))[1]
    if isinstance(cfg, Mamba2Config):
        groups = cfg.n_groups if _norms_per_group(hf_model) else 1
        if cfg.norm_groups != groups:
            raise CheckpointError(
                f"transformers {transformers.__version__} takes the gated norm in {groups} groups for "
                f"n_groups={cfg.n_groups}; expected norm_groups={groups}, got {cfg.norm_groups}"
            )
    weights = {name: state[name].detach().clone() for name in state}
    embeddings = weights[next(name for name in state if name.endswith(("embeddings.weight", "embed_tokens.weight")))]
    if cfg.tie_embeddings:
        weights["lm_head.weight"] = embeddings
    hf_model.load_state_dict(weights, strict=True, assign=True)
    hf_model.tie_weights()
    for module in hf_model.modules():  # frequencies, multipliers and the like, which no file has
        for name, buffer in module.named_buffers(recurse=False):
            if name not in weights:  # detached: some releases register parameters as buffers, and it must stay one
                setattr(module, name, buffer.detach().to(embeddings.device))
    if isinstance(cfg, HybridConfig) and isinstance(mixer := cfg.branches.get("mixer"), Mamba2Config):
        for module in hf_model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = mixer.dt_limit
    stored = embeddings.dtype
    setattr(hf_model.config, "dtype" if hasattr(hf_model.config, "dtype") else "torch_dtype", stored)
    return hf_model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have no memory for their parameters, one tensor at a time apart; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
