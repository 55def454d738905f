"""Finding a GGUF file, and from it to our config and our weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig, ModelConfig
from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading.gguf import falcon_h1, granite, jamba, lfm2, nemotron_h, qwen3, rwkv7
from hooked_mamba.loading.gguf.keys import ARCHITECTURE, FILE, text_of
from hooked_mamba.loading.gguf.mamba import mamba2_to_ours, mamba_to_ours
from hooked_mamba.loading.gguf.parts import models_in, read_parts
from hooked_mamba.loading.gguf.types import open_tensors
from hooked_mamba.loading.tables import CheckpointError, LazyState, some
from hooked_mamba.recurrent_config import RWKV7Config

__all__ = ["GGUF_FORMATS", "GGUFFormat", "gguf_file", "open_gguf"]


class GGUFFormat(NamedTuple):
    """One architecture of GGUF files."""

    family: str
    config_class: type[ModelConfig]
    to_ours: Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Any, LazyState]]


HYBRIDS: dict[str, Any] = {
    "falcon-h1": falcon_h1,
    "granitehybrid": granite,
    "jamba": jamba,
    "lfm2": lfm2,
    "nemotron_h": nemotron_h,
    "nemotron_h_moe": nemotron_h,
    "qwen35": qwen3,
    "qwen35moe": qwen3,
    "qwen3next": qwen3,
}

GGUF_FORMATS = {
    "mamba": GGUFFormat("mamba", MambaConfig, mamba_to_ours),
    "mamba2": GGUFFormat("mamba2", Mamba2Config, mamba2_to_ours),
    "rwkv7": GGUFFormat("rwkv7", RWKV7Config, rwkv7.to_ours),
    **{name: GGUFFormat("hybrid", HybridConfig, module.to_ours) for name, module in HYBRIDS.items()},
}
"""`general.architecture` -> how it is read."""

REFUSED = {
    "plamo2": "its norms behind each branch and its way to scale them are not computed here",
    "kimi-linear": "its attention compresses keys and values into a latent (MLA), which is not computed here",
    "lfm2moe": "its experts beside short convolutions are not computed here",
    "rwkv6": "RWKV-7 is the only RWKV here",
    "rwkv6qwen2": "RWKV-7 is the only RWKV here",
    "arwkv7": "its blocks are those of Qwen around RWKV-7, which are not computed here",
}
"""Architectures near to those here -> what is missing for them."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pth")
"""What a folder is read from rather than from a GGUF file beside it."""


def gguf_file(place: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder without other weights holds; of a model in parts, one of them.

    Raises
    ------
    CheckpointError
        The folder holds several models.
    """
    if place.is_file():
        return place if place.suffix == ".gguf" else None
    found = models_in(path.name for path in place.glob("*.gguf"))
    if not found or any(path for pattern in WEIGHTS for path in place.glob(pattern)):
        return None
    if len(found) > 1:
        raise CheckpointError(f"{place} holds several GGUF files, {some(found)}; give the path of one of them")
    return place / found[0]


def open_gguf(path: Path) -> tuple[str, dict[str, Any], LazyState]:
    """A GGUF file's architecture, its keys and its tensors, none of which is read yet.

    Of a model in parts, `path` is any of them.

    Raises
    ------
    CheckpointError
        A damaged file, an architecture that is not read, or parts that are missing.
    """
    headers = read_parts(path)
    header, path = headers[0], headers[0].path
    kind = text_of(header.keys, "general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path} is of general.type={kind!r}, no whole model; expected 'model'")
    architecture = text_of(header.keys, ARCHITECTURE)
    if architecture not in GGUF_FORMATS:
        why = REFUSED.get(architecture or "")
        if why is not None:
            raise CheckpointError(f"{path} is of the architecture {architecture!r}, which is not supported: {why}")
        known = ", ".join(GGUF_FORMATS)
        found = f"is of the architecture {architecture!r}" if architecture is not None else f"has no {ARCHITECTURE}"
        raise CheckpointError(f"{path} {found}; expected one of {known}")
    opened = [open_tensors(one) for one in headers]
    getters = {name: state.getter(name) for state in opened for name in state}
    places = {name: state.place(name) for state in opened for name in state}
    return architecture, header.keys | {FILE: str(path)}, LazyState(getters, places)
