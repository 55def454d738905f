"""SAELens directories: how configs and tensors correspond (SAELens 6, its `load_from_disk`).

SAELens reads `cfg.json` and `sae_weights.safetensors`. It wants the exact tensors of the architecture, and leaves
keys of the config that it does not know alone. At inference BatchTopK and Matryoshka are JumpReLU with one threshold,
and are written as such. It has no TopK or gated transcoder, and none that reads several positions: those are written
under names of the same pattern, which it refuses by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saes.config import ARCHITECTURES, ONLY_READ, CoderConfig
from saes.files.checks import CoderFileError, Hints, check_tensors, dtype_name, field, nearest
from saes.files.sites import coder_config

VERSION = "6.0.0"
"""Of SAELens, whose format this is."""

READ = {
    **{name: name for name in ("standard", "topk", "abstopk", "jumprelu", "gated", "batchtopk")},
    "matryoshka_batchtopk": "batchtopk",
    **{"transcoder": "standard", "skip_transcoder": "standard"},
    **{"jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu"},
}
"""Architectures of SAELens that can be read, and what they are here."""

REFUSED = {
    "matching_pursuit": "chooses one latent after the other, each by what those before it left over, so that latents"
    " are no function of x W_enc + b_enc",
    "temporal": "reads other positions of the text by attention, and a coder here reads one",
}
"""Architectures of SAELens that no coder here computes, and why."""

WRITTEN_AS = {
    name: "jumprelu" if name in ("batchtopk", "matryoshka") else name for name in (*ARCHITECTURES, *ONLY_READ)
}

_IN_OLD_FILES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_OF_THE_MODEL = ("model_name", "hook_name", "hook_name_out", "hook_head_index")


def architecture_name(cfg: CoderConfig) -> str:
    """SAELens' name for a coder, or one of the same pattern."""
    name = WRITTEN_AS[cfg.architecture]
    if cfg.is_sae and not cfg.skip:
        return name
    kind = f"{'window_' if cfg.window > 1 else ''}{'skip_' if cfg.skip else ''}transcoder"
    return kind if name == "standard" else f"{name}_{kind}"


def saelens_reads(cfg: CoderConfig) -> bool:
    """Whether SAELens can load what is written of such a coder."""
    name = architecture_name(cfg)
    return name in READ and not ("transcoder" in name and cfg.apply_b_dec_to_input)


def config_of(cfg: CoderConfig, dtype: str) -> dict[str, Any]:
    """The config that SAELens reads."""
    name = architecture_name(cfg)
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.model_name,
            "hook_name": cfg.in_site,
        },
    }
    if name in ("topk", "abstopk"):
        config |= {"rescale_acts_by_decoder_norm": False}
    if cfg.architecture in ("topk", "abstopk", "groupmax"):
        config |= {"k": cfg.k}
    if "transcoder" in name:
        config["d_out"] = cfg.d_out
        config["metadata"]["hook_name_out"] = cfg.out_site
    return config


def shapes_of(architecture: str, d_in: int, d_out: int, d_sae: int, skip: bool) -> dict[str, tuple[int, ...]]:
    """The tensors in the file of "standard", "topk", "jumprelu" or "gated", and their shapes."""
    biases = {"gated": ["b_gate", "r_mag", "b_mag"], "jumprelu": ["b_enc", "threshold"]}.get(architecture, ["b_enc"])
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(biases, (d_sae,))
    return shapes | ({"W_skip": (d_out, d_in)} if skip else {})


def file_shapes(cfg: CoderConfig) -> dict[str, tuple[int, ...]]:
    """The same of a coder."""
    return shapes_of(WRITTEN_AS[cfg.architecture], cfg.d_in, cfg.d_out, cfg.d_sae, cfg.skip)


def to_file(cfg: CoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as they lie in the file."""
    out = dict(state)
    if cfg.skip:
        out["W_skip"] = out["W_skip"].t()
    if "threshold" in out and out["threshold"].ndim == 0:
        out["threshold"] = out["threshold"].expand(cfg.d_sae)
    return out


def from_file(cfg: CoderConfig, state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """And back."""
    out = dict(state)
    if cfg.skip:
        out["W_skip"] = out["W_skip"].t()
    if WRITTEN_AS[cfg.architecture] != cfg.architecture:
        threshold = out["threshold"]
        if bool((threshold != threshold[0]).any()):
            raise CoderFileError(
                f"{where} says {cfg.architecture}, which has one threshold, but thresholds from {threshold.min():g} to"
                f" {threshold.max():g}; expected all the same, or jumprelu"
            )
        out["threshold"] = threshold[0].clone()
    return out


def modern(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A config in the form of SAELens 6; before, all fields lay side by side and TopK was an activation function."""
    version = config.get("sae_lens_version")
    about = config.get("metadata")
    if isinstance(about, Mapping):
        version = version or about.get("sae_lens_version")
    major = re.match(r"\d+", str(version or "0"))
    if major is None:
        raise CoderFileError(f"{where} has sae_lens_version={version!r}, expected a version such as {VERSION}")
    if int(major[0]) >= 6:
        return {**config, "metadata": field(config, "metadata", dict, where)}
    new = {_IN_OLD_FILES.get(key, key): value for key, value in config.items()}
    kind = str(new.get("activation_fn", "relu"))
    if kind not in ("relu", "topk"):
        raise CoderFileError(f"{where} has the activation function {kind!r}; expected 'relu' or 'topk'")
    new.setdefault("architecture", "standard")
    if kind == "topk":
        options = new.get("activation_fn_kwargs")
        new["architecture"], new["k"] = "topk", options.get("k") if isinstance(options, Mapping) else None
    if new.get("normalize_activations") in (None, False):
        new["normalize_activations"] = "none"
    new["metadata"] = {key: new[key] for key in _OF_THE_MODEL if key in new}
    return new


def read_foreign(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hints: Hints, where: Path, weights_at: Path
) -> tuple[CoderConfig, Callable[[], dict[str, Tensor]]]:
    """The config of a directory that SAELens wrote, and what reads its weights.

    Raises
    ------
    CoderFileError
        What does not fit together, or cannot be expressed here.
    """
    config = modern(config, where)
    name = field(config, "architecture", str, where)
    if name in REFUSED:
        raise CoderFileError(
            f"{where} has architecture {name!r}, which {REFUSED[name]}. Such a coder can only be used in SAELens"
        )
    if name not in READ:
        raise CoderFileError(
            f"{where} has architecture {name!r}, expected one of {', '.join(READ)}{nearest(name, READ)}"
        )
    _refuse_what_changes_activations(config, where, hints.norm_factor)
    if "dtype" in config:
        dtype_name(field(config, "dtype", str, where), f"dtype in {where}")
    transcoder, about = "transcoder" in name, config["metadata"]
    if transcoder and hints.norm_factor is not None:
        raise CoderFileError(f"norm_factor= is for SAEs; {where} is a transcoder, whose output has its own scale")
    d_in, d_sae = field(config, "d_in", int, where), field(config, "d_sae", int, where)
    apply = config.get("apply_b_dec_to_input", not transcoder)
    if not isinstance(apply, bool):
        raise CoderFileError(f"{where} has apply_b_dec_to_input={apply!r}, expected true or false")
    k = hints.k
    if k is None and READ[name] in ("topk", "abstopk", "batchtopk"):
        number = config.get("k")  # a BatchTopK's may be a float there
        if isinstance(number, float) and number.is_integer():
            config = {**config, "k": int(number)}
        k = field(config, "k", int, where)
    cfg = coder_config(
        dataclasses.replace(hints, k=k),
        where,
        transcoder=transcoder,
        found_in=about.get("hook_name"),
        found_out=about.get("hook_name_out"),
        found_model=about.get("model_name"),
        architecture=READ[name],
        d_in=d_in,
        d_out=field(config, "d_out", int, where) if transcoder else d_in,
        d_sae=d_sae,
        skip="skip" in name,
        apply_b_dec_to_input=apply,
    )

    def weights() -> dict[str, Tensor]:
        return _foreign_weights(cfg, config, tensors, where, weights_at, hints.norm_factor)

    return cfg, weights


NORMALISED = {
    "layer_norm": "shifts and divides each example by its own mean and spread",
    "constant_norm_rescale": "divides each example by its own norm",
}
"""Normalisations that differ from example to example, which no weights can hold."""


def _refuse_what_changes_activations(config: Mapping[str, Any], where: Path, factor: float | int | None) -> None:
    _check_normalisation(config.get("normalize_activations", "none"), where, factor)
    reshape = config.get("reshape_activations", "none")
    if reshape != "none":
        raise CoderFileError(f"{where} has reshape_activations={reshape!r}; expected 'none'")
    if config.get("hook_head_index") is not None or config["metadata"].get("hook_head_index") is not None:
        raise CoderFileError(f"{where} is of one attention head (hook_head_index); expected a whole site")


def _check_normalisation(kind: Any, where: Path, factor: float | int | None) -> None:
    said = f"{where} has normalize_activations={kind!r}"
    if kind == "expected_average_only_in" or kind is True:
        if factor is None:
            raise CoderFileError(
                f"{said}: its activations are multiplied by one factor, sqrt(d_in) / (mean norm of the training's"
                " activations), which is not in the file. Give it, norm_factor=, and it is worked into the weights"
            )
    elif factor is not None:
        raise CoderFileError(f"{said}, and norm_factor= is for 'expected_average_only_in'; leave it out")
    elif isinstance(kind, str) and kind in NORMALISED:
        raise CoderFileError(
            f"{said}: it {NORMALISED[kind]} before encoding and undoes that after decoding, which coders here do not"
            " do and which no change of the weights can replace. Such a coder can only be used in SAELens"
        )
    elif kind == "covariance_whitening":
        raise CoderFileError(
            f"{said}: its activations are multiplied by a matrix, which is not in this file but in the training's"
            " activation_whitening.safetensors. Work it into the weights in SAELens,"
            " sae.fold_activation_whitening(mean, matrix, inverse_matrix), and save the result"
        )
    elif kind != "none":
        raise CoderFileError(f"{said}; expected 'none' or 'expected_average_only_in'")


def _foreign_weights(
    cfg: CoderConfig,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: Path,
    weights_at: Path,
    factor: float | int | None,
) -> dict[str, Tensor]:
    trained = "topk_threshold" in tensors  # saved during training: the threshold is one number
    kind = "standard" if trained else WRITTEN_AS[cfg.architecture]
    shapes = shapes_of(kind, cfg.d_in, cfg.d_out, cfg.d_sae, cfg.skip)
    if trained and cfg.architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    if "scaling_factor" in tensors:
        shapes["scaling_factor"] = (cfg.d_sae,)
    check_tensors(tensors, shapes, weights_at)
    state = {name: tensors[name] for name in shapes}
    scaling = state.pop("scaling_factor", None)
    if scaling is not None and bool((scaling != 1).any()):
        raise CoderFileError(f"{weights_at} has a scaling_factor other than 1, which cannot be expressed here")
    if "topk_threshold" in state:
        state["threshold"] = state.pop("topk_threshold").expand(cfg.d_sae)
    rescale = config.get("rescale_acts_by_decoder_norm", trained)
    if not isinstance(rescale, bool):
        raise CoderFileError(f"{where} has rescale_acts_by_decoder_norm={rescale!r}, expected true or false")
    if rescale and cfg.architecture in ("topk", "abstopk", "batchtopk"):
        wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in state.items()}
        norm = wide["W_dec"].norm(dim=1)
        if bool((norm == 0).any()):
            raise CoderFileError(f"{where} rescales latents by decoder norms, and some rows of W_dec are 0")
        # z = act(|d| pre) / |d| d: the same with rows of length 1 and |d| worked into the encoder.
        state = wide | {"W_enc": wide["W_enc"] * norm, "b_enc": wide["b_enc"] * norm}
        state["W_dec"] = wide["W_dec"] / norm.unsqueeze(1)
    if factor is not None:  # f x - b_dec = f (x - b_dec / f), and the output is divided by f
        wide = {name: state[name].to(torch.promote_types(state[name].dtype, torch.float32)) for name in state}
        state = wide | {"W_enc": wide["W_enc"] * factor}
        state |= {name: wide[name] / factor for name in ("W_dec", "b_dec")}
    return from_file(cfg, state, weights_at)
