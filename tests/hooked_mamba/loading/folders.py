"""One tiny random checkpoint of every family as its own library writes it: its config and its tensors, by family."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_mamba import HookedDeltaNet, HookedMamba3, HookedRWKV7
from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.recurrent_config import DeltaNetConfig, Mamba3Config, RWKV7Config
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.recurrent.test_deltanet_families import theirs as deltanets
from tests.hooked_mamba.tiny import randomize


def _mamba(kind: str) -> Any:
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4, "use_bias": True}
    if kind == "Mamba2":
        fields |= {"head_dim": 8, "num_heads": 8, "n_groups": 1, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = hybrids.randomize(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    if not model._tied_weights_keys:
        model._tied_weights_keys = ["lm_head.weight"]  # transformers 4.50 cannot save a tied Mamba-2 otherwise
    return model


def _deltanets(case: str) -> Any:
    return deltanets(case, linear_key_head_dim=8, linear_value_head_dim=8, intermediate_size=32)


STACK = {"d_model": 16, "n_layers": 2}
"""Sizes that packed weights can have: multiples of 16."""


def _gated_deltanet() -> Any:
    mixer = DeltaNetConfig(**STACK, n_key_heads=2, n_value_heads=4, key_dim=8, value_dim=8)
    branches = {"mixer": mixer, "mlp": MLPConfig(**STACK, d_mlp=32)}
    layout = ((("mixer",), ("mlp",)),) * 2
    fields = {"d_vocab": 17, "tie_embeddings": False, "architecture": "gated_deltanet", "eps": mixer.norm_eps}
    return randomize(HookedDeltaNet(HybridConfig(**STACK, **fields, branches=branches, layout=layout)))


def _rwkv7() -> Any:
    ranks = {"decay_rank": 16, "rate_rank": 8, "value_rank": 8, "gate_rank": 16}
    return randomize(HookedRWKV7(RWKV7Config(**STACK, d_vocab=17, head_dim=4, d_mlp=32, **ranks)))


def _mamba3() -> Any:
    mixer = Mamba3Config(**STACK, A_act="softplus", d_state=8, head_dim=8, n_groups=2)
    fields = {"d_vocab": 24, "tie_embeddings": True, "architecture": "mamba3"}
    layout = ((("mixer",),),) * 2
    return randomize(HookedMamba3(HybridConfig(**STACK, **fields, branches={"mixer": mixer}, layout=layout)))


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
    "Qwen3-Next": lambda: _deltanets("qwen3_next"),
    "Qwen3.5": lambda: _deltanets("qwen3_5"),
    "OLMo Hybrid": lambda: _deltanets("olmo_hybrid"),
    "gated DeltaNet": _gated_deltanet,
    "RWKV-7": _rwkv7,
    "Mamba-3": _mamba3,
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
