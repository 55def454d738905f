"""PEFT's folders made by hand from the description of its format, and what merging them makes, in plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."

BASE = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "auto_mapping": None, "revision": None,
    "base_model_name_or_path": "some/base", "inference_mode": True, "r": 3, "lora_alpha": 5, "lora_dropout": 0.05,
    "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
    "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "exclude_modules": None,
    "layers_to_transform": None, "layers_pattern": None, "layer_replication": None, "loftq_config": {},
    "megatron_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16, "use_qalora": False,
    "trainable_token_indices": None, "target_parameters": None, "alora_invocation_tokens": None,
}  # fmt: skip
"""adapter_config.json of PEFT 0.21."""


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it; target_modules are the last parts of the modules' names, where none are given."""
    ends = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}
    folder.mkdir(parents=True, exist_ok=True)
    values = BASE | {"target_modules": sorted(ends)} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {PREFIX + name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def factors(module: str, weight: Tensor, r: int = 3, seed: int = 0, dora: bool = False) -> dict[str, Tensor]:
    """A and B of a linear layer, with DoRA m as well."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, module)))
    out, into = weight.shape
    made = {f"{module}.lora_A.weight": torch.randn(r, into, generator=generator) * 0.3}
    made[f"{module}.lora_B.weight"] = torch.randn(out, r, generator=generator) * 0.3
    if dora:
        made[f"{module}.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 0.5
    return made


def embedding_factors(module: str, weight: Tensor, r: int = 3, dora: bool = False) -> dict[str, Tensor]:
    """A and B of an embedding, which stand the other way round there."""
    generator = torch.Generator().manual_seed(7)
    vocab, d = weight.shape
    made = {f"{module}.lora_embedding_A": torch.randn(r, vocab, generator=generator) * 0.3}
    made[f"{module}.lora_embedding_B"] = torch.randn(d, r, generator=generator) * 0.3
    if dora:
        made[f"{module}.lora_magnitude_vector"] = torch.rand(d, generator=generator) + 0.5
    return made


def merged(weight: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor | None = None) -> Tensor:
    """W + scale B A entry by entry, and DoRA's m / |row|, in float64; rounded to float32 at the end."""
    W, A_, B_ = (value.double().numpy() for value in (weight, A, B))
    out = np.empty_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            out[i, j] = W[i, j] + scale * math.fsum(B_[i, k] * A_[k, j] for k in range(len(A_)))
    if m is not None:
        for i in range(W.shape[0]):
            out[i] *= float(m[i]) / math.sqrt(math.fsum(x * x for x in out[i]))
    return torch.from_numpy(out).float()
