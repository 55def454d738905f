"""One tiny random checkpoint of every family as its own library writes it: its config and its tensors, by family."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_mamba import HookedDeltaNet
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.recurrent import models as recurrent
from tests.hooked_mamba.recurrent.test_deltanet_families import theirs as deltanets
from tests.hooked_mamba.recurrent.test_mamba3 import in_files as mamba3


def _mamba(kind: str) -> Any:
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4, "use_bias": True}
    if kind == "Mamba2":
        fields |= {"head_dim": 8, "num_heads": 8, "n_groups": 1, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(**fields)
    return hybrids.randomize(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


def _gated_deltanet() -> Any:
    model = recurrent.build("deltanet")
    fields = {"architecture": "gated_deltanet", "eps": model.cfg.branches["mixer"].norm_eps}
    fla = HookedDeltaNet(dataclasses.replace(model.cfg, **fields)).double()
    fla.load_state_dict(model.state_dict())
    return fla


MAKERS: dict[str, Callable[[], Any]] = {
    "Mamba": lambda: _mamba("Mamba"),
    "Falcon-Mamba": lambda: _mamba("FalconMamba"),
    "Mamba-2": lambda: _mamba("Mamba2"),
    "Jamba": lambda: hybrids.twin("jamba"),
    "Bamba": lambda: hybrids.twin("bamba"),
    "Granite 4 H": lambda: hybrids.twin("granite-moe"),
    "Nemotron-H": lambda: hybrids.twin("nemotron"),
    "Falcon-H1": lambda: hybrids.twin("falcon"),
    "Zamba": lambda: hybrids.twin("zamba"),
    "Zamba2": lambda: hybrids.twin("zamba2"),
    "LFM2": lambda: hybrids.twin("lfm2"),
    "Qwen3-Next": lambda: deltanets("qwen3_next"),
    "Qwen3.5": lambda: deltanets("qwen3_5"),
    "OLMo Hybrid": lambda: deltanets("olmo_hybrid"),
    "gated DeltaNet": _gated_deltanet,
    "RWKV-7": lambda: recurrent.build("rwkv7"),
    "Mamba-3": lambda: mamba3("plain"),
}
"""Family, as the table in docs/loading.md calls it -> a model that has `save_pretrained`."""


@functools.cache
def files_of(family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors, in float32."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        MAKERS[family]().save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        weights = load_file(f"{folder}/model.safetensors")
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    return config, {name: value.float() for name, value in weights.items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A folder with one file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def linears(weights: dict[str, Tensor]) -> list[str]:
    """Modules that are linear layers: matrices but embeddings."""
    return [
        name.removesuffix(".weight")
        for name, value in weights.items()
        if name.endswith(".weight") and value.ndim == 2 and "embed" not in name
    ]
