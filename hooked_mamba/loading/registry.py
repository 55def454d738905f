"""The formats a checkpoint can have, and how to tell which one it is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig, ModelConfig
from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading import (
    codestral,
    hf_falcon_mamba,
    hf_mamba,
    hf_mamba2,
    hf_rwkv7,
    raw_mamba,
    raw_mamba2,
    raw_rwkv7,
)
from hooked_mamba.loading.gguf.opened import GGUF_FORMATS
from hooked_mamba.loading.hybrids import (
    bamba,
    falcon_h1,
    gated_deltanet,
    granite,
    jamba,
    lfm2,
    mamba3,
    nemotron_h,
    olmo_hybrid,
    qwen3,
    zamba,
)
from hooked_mamba.loading.raw_fields import ssm_layer
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.tensor_files import read_json
from hooked_mamba.loading.world_tokenizer import find_world_tokenizer
from hooked_mamba.recurrent_config import RWKV7Config

__all__ = [
    "CLASS_OF_FAMILY",
    "FORMATS",
    "Format",
    "check_family",
    "detect",
    "detect_folder",
    "format_for",
    "lone_file",
]

CLASS_OF_FAMILY = {
    "mamba": "HookedMamba",
    "mamba2": "HookedMamba2",
    "rwkv7": "HookedRWKV7",
    "hybrid": "HookedHybrid",
}

HYBRIDS: dict[str, Any] = {
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "gated_deltanet": gated_deltanet,
    "granitemoehybrid": granite,
    "jamba": jamba,
    "lfm2": lfm2,
    "mamba3": mamba3,
    "nemotron_h": nemotron_h,
    "olmo_hybrid": olmo_hybrid,
    "qwen3_5": qwen3,
    "qwen3_5_moe": qwen3,
    "qwen3_5_moe_text": qwen3,
    "qwen3_5_text": qwen3,
    "qwen3_next": qwen3,
    "zamba": zamba,
    "zamba2": zamba,
}
"""model_type of transformers -> the module that reads it."""


@dataclass(frozen=True)
class Format:
    """One checkpoint format: its name, the model family it holds, and the pair of functions that map it."""

    name: str
    family: str
    config_class: type[ModelConfig]
    to_ours: Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Any, LazyState]]
    from_ours: Callable[..., tuple[dict[str, Any], LazyState]]
    kind: str | None = None
    """What `save_pretrained(format=)` calls it: "hf", "raw", or None for what is only read."""
    writes: Callable[[Any], bool] = lambda cfg: True
    """Whether it can hold a config of its class."""
    raw_file: str = "pytorch_model.bin"
    """The one file of the "raw" kind."""
    has_config: bool = True
    """Whether there is a config beside the weights."""
    find_tokenizer: Callable[[Path | None, int], Any] | None = None
    """(folder, rows of the embedding) -> the tokenizer, of a kind that transformers does not read; None without one."""


def _no_mixer_norms(cfg: Any) -> bool:
    return not cfg.mixer_norms


def _is(architecture: str) -> Callable[[Any], bool]:
    return lambda cfg: cfg.architecture == architecture


def _not_written(*_: Any) -> Any:
    raise CheckpointError("GGUF files are read and not written; expected format='hf' or 'raw'")


WORLD: dict[str, Any] = {"find_tokenizer": find_world_tokenizer}

FORMATS = {
    row.name: row
    for row in (
        Format(
            "hf_mamba", "mamba", MambaConfig, hf_mamba.to_ours, hf_mamba.from_ours, "hf", lambda c: not c.mixer_norms
        ),
        Format("hf_falcon_mamba", "mamba", MambaConfig, hf_falcon_mamba.to_ours, hf_falcon_mamba.from_ours, "hf"),
        Format("hf_mamba2", "mamba2", Mamba2Config, hf_mamba2.to_ours, hf_mamba2.from_ours, "hf"),
        Format("raw_mamba", "mamba", MambaConfig, raw_mamba.to_ours, raw_mamba.from_ours, "raw"),
        Format("raw_mamba2", "mamba2", Mamba2Config, raw_mamba2.to_ours, raw_mamba2.from_ours, "raw"),
        Format(
            "raw_mamba3",
            "hybrid",
            HybridConfig,
            mamba3.raw_to_ours,
            mamba3.raw_from_ours,
            "raw",
            _is("mamba3"),
        ),
        *(
            Format(f"hf_{name}", "hybrid", HybridConfig, module.to_ours, module.from_ours, "hf", _is(name))
            for name, module in HYBRIDS.items()
        ),
        Format("hf_rwkv7", "rwkv7", RWKV7Config, hf_rwkv7.to_ours, hf_rwkv7.from_ours, "hf", **WORLD),
        Format(
            "raw_rwkv7",
            "rwkv7",
            RWKV7Config,
            raw_rwkv7.to_ours,
            raw_rwkv7.from_ours,
            "raw",
            raw_file="model.pth",
            has_config=False,
            **WORLD,
        ),
        Format("codestral", "mamba2", Mamba2Config, codestral.to_ours, codestral.from_ours),
        *(
            Format(f"gguf_{name}", row.family, row.config_class, row.to_ours, _not_written, has_config=False)
            for name, row in GGUF_FORMATS.items()
        ),
    )
}

MODEL_TYPES = {"mamba": "hf_mamba", "mamba2": "hf_mamba2", "falcon_mamba": "hf_falcon_mamba", "rwkv7": "hf_rwkv7"} | {
    name: f"hf_{name}" for name in HYBRIDS
}
LAYERS = {"Mamba1": "raw_mamba", "Mamba2": "raw_mamba2", "Mamba3": "raw_mamba3"}


def detect(config: Mapping[str, Any]) -> Format:
    """The format of a config, from its fields.

    Raises
    ------
    CheckpointError
        None of the known formats, or a family for which there is no model here.
    """
    if "hidden_size" in config:  # before the raw names: early conversions carry both
        return FORMATS[_choose(config.get("model_type"), MODEL_TYPES, "model_type")]
    if "d_model" in config:
        return FORMATS[_choose(ssm_layer(config), LAYERS, "ssm_cfg layer")]
    if "dim" in config and "n_groups" in config:
        return FORMATS["codestral"]
    if config.get("model_type") in MODEL_TYPES:
        return FORMATS[MODEL_TYPES[config["model_type"]]]
    raise CheckpointError(
        f"this config is of no known format: it has {', '.join(sorted(config)) or 'no fields'}; expected "
        "hidden_size and model_type (transformers), d_model and n_layer (mamba_ssm), or dim and n_groups (params.json)"
    )


REFUSED = {
    "kimi_linear": "its attention compresses keys and values into a latent (MLA), which is not computed here",
}
"""model_type of families near to those here -> what is missing for them."""


def _choose(value: Any, known: Mapping[str, str], what: str) -> str:
    if value in known:
        return known[value]
    if value in REFUSED:
        raise CheckpointError(f"{what} {value!r} is not supported: {REFUSED[value]}")
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise CheckpointError(f"{what} {value!r} is not supported; expected one of {', '.join(known)}{hint}")


def detect_folder(folder: Path) -> tuple[Format, dict[str, Any]]:
    """The format and the config of a checkpoint folder.

    A folder may hold two forms of one model; the one whose weights are there counts.

    Raises
    ------
    CheckpointError
        No config, or one that :func:`detect` refuses.
    """
    has_params = (folder / "params.json").is_file()
    has_config = (folder / "config.json").is_file()
    only_consolidated = (folder / "consolidated.safetensors").is_file() and not (
        any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    )
    if lone_file(folder) is not None:
        return FORMATS["raw_rwkv7"], {}
    if has_params and (only_consolidated or not has_config):
        config = read_json(folder / "params.json")
    elif has_config:
        config = read_json(folder / "config.json")
    elif (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise CheckpointError(
            f"{folder} is an adapter of PEFT, not a model: load_model({base!r}, adapter={str(folder)!r})"
        )
    else:
        present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder} has no config.json and no params.json; found {present}")
    return detect(config), config


def lone_file(place: Path) -> Path | None:
    """The `.pth` file that a path is, or that a folder without other weights holds.

    Raises
    ------
    CheckpointError
        The folder holds several.
    """
    if place.is_file():
        return place if place.suffix == ".pth" else None
    found = sorted(place.glob("*.pth"))
    if not found or any(place.glob("*.safetensors")) or any(place.glob("pytorch_model*.bin")):
        return None
    if len(found) > 1:
        raise CheckpointError(f"{place} holds {', '.join(path.name for path in found)}; give the path of one of them")
    return found[0]


def check_family(found: str, expected: str | None, name: str) -> None:
    """Refuse a checkpoint of the other family, naming the class that reads it.

    Raises
    ------
    CheckpointError
        `found` is not `expected`.
    ValueError
        `expected` is no family.
    """
    if expected is not None and expected not in CLASS_OF_FAMILY:
        raise ValueError(f"no family {expected!r}; expected one of {', '.join(CLASS_OF_FAMILY)}")
    if expected is not None and found != expected:
        raise CheckpointError(
            f"{name} is of the family {found!r}, not {expected!r}; load it with "
            f"{CLASS_OF_FAMILY[found]}.from_pretrained instead of {CLASS_OF_FAMILY[expected]}.from_pretrained"
        )


def format_for(cfg: ModelConfig, kind: str) -> Format:
    """The format in which a model of `cfg` is written.

    Parameters
    ----------
    cfg
        The model's config.
    kind
        "hf" (transformers' form) or "raw" (that of the authors' code).

    Raises
    ------
    ValueError
        Another kind.
    CheckpointError
        No format of this kind for such a model.
    """
    if kind not in ("hf", "raw"):
        raise ValueError(f"no checkpoint format {kind!r}; expected 'hf' or 'raw'")
    for row in FORMATS.values():
        if row.kind == kind and row.config_class is type(cfg) and row.writes(cfg):
            return row
    raise CheckpointError(f"there is no {kind!r} format for a model of {type(cfg).__name__}")
