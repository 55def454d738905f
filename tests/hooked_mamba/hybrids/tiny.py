"""Tiny hybrids of every family: transformers' own objects with every weight random, and the files it writes of them."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from hooked_mamba import HookedHybrid

COMMON = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"mamba_d_state": 6, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 5}

GRANITE = COMMON | MAMBA2 | {"num_hidden_layers": 4, "layer_types": ["mamba", "attention", "mamba", "mamba"]}
GRANITE |= {"embedding_multiplier": 12, "logits_scaling": 0.5, "residual_multiplier": 0.4, "attention_multiplier": 0.3}
GRANITE |= {"shared_intermediate_size": 40, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}

FALCON = COMMON | {"num_hidden_layers": 3, "head_dim": 10, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8}
FALCON |= {"mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 5, "lm_head_multiplier": 0.7}
FALCON |= {"embedding_multiplier": 5.0, "mlp_multipliers": [0.9, 0.6], "key_multiplier": 0.8}
FALCON |= {"attention_in_multiplier": 1.1, "attention_out_multiplier": 0.95, "ssm_in_multiplier": 1.25}
FALCON |= {"ssm_multipliers": [0.7, 0.5, 0.6, 0.8, 0.9], "ssm_out_multiplier": 0.55}

NEMOTRON = COMMON | {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"], "head_dim": 10}
NEMOTRON |= {"mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 5}
NEMOTRON |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_latent_size": 16}
NEMOTRON |= {"moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28, "routed_scaling_factor": 2.5}

ZAMBA = COMMON | MAMBA | {"num_key_value_heads": 4}
ZAMBA |= {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba": (
        "Jamba",
        COMMON
        | MAMBA
        | {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 5}
        | {"use_mamba_kernels": False},
    ),
    "bamba": ("Bamba", COMMON | MAMBA2 | {"num_hidden_layers": 4, "attn_layer_indices": [2]}),
    "granite-moe": (
        "GraniteMoeHybrid",
        GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2, "position_embedding_type": "nope"},
    ),
    "granite-dense": (
        "GraniteMoeHybrid",
        GRANITE | {"num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "rope"},
    ),
    "nemotron": ("NemotronH", NEMOTRON),
    "falcon": ("FalconH1", FALCON | {"mamba_rms_norm": False, "mamba_norm_before_gate": False}),
    "falcon-norm-first": ("FalconH1", FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    "falcon-gate-first": ("FalconH1", FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "lfm2": (
        "Lfm2",
        COMMON
        | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"], "conv_bias": True}
        | {"block_multiple_of": 8, "tie_word_embeddings": True},
    ),
    "zamba": ("Zamba", ZAMBA | {"num_hidden_layers": 5, "n_mamba_heads": 2, "mamba_dt_rank": 5}),
    "zamba2": (
        "Zamba2",
        ZAMBA
        | {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"]}
        | {"num_mem_blocks": 2, "adapter_rank": 4, "use_shared_attention_adapter": True, "use_mem_rope": True}
        | {"n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 5},
    ),
}
"""Name -> (transformers' class, its fields)."""


COVERED = ("falcon", "falcon-gate-first", "granite-dense")
"""Cases without a kind of site or branch that others lack."""
SOME = [pytest.param(case, marks=[pytest.mark.slow] if case in COVERED else []) for case in CASES]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew, away from its usual 0 or 1, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, b) for name, b in model.named_buffers() if "correction" in name]
    done: set[int] = set()
    for name, p in [*model.named_parameters(), *buffers]:
        if id(p) in done:
            continue
        done.add(id(p))
        if "norm" in name and p.ndim == 1:
            p.uniform_(0.5, 1.5, generator=generator)
        elif "dt" in name and "bias" in name:
            p.uniform_(-4, 0.5, generator=generator)
        elif name.endswith("A_log"):
            p.uniform_(-0.5, 2, generator=generator)
        elif name.endswith(".D"):
            p.uniform_(-1.5, 1.5, generator=generator)
        elif "conv" in name:
            p.uniform_(-0.6, 0.6, generator=generator)
        elif "correction" in name or name.endswith("bias"):
            p.uniform_(-0.3, 0.3, generator=generator)
        elif "embed" in name:
            p.normal_(0, 0.5, generator=generator)
        else:
            p.normal_(0, 1 / math.sqrt(p.shape[-1]), generator=generator)
    return model


def config(case: str, **changes: Any) -> Any:
    """A config of transformers."""
    name, fields = CASES[case]
    cls = getattr(transformers, f"{name}Config", None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return cls(**(fields | changes))


def twin(case: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers."""
    cfg = config(case, **changes)
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("hybrids are compared with transformers 5: 4 reads some of these configs otherwise")
    model = transformers.AutoModelForCausalLM.from_config(cfg, experts_implementation="eager")
    return published(randomize(model, seed).eval())


def published(hf: Any) -> Any:
    """The clamp of dt that the config states: some classes of transformers clamp by time_step_min instead."""
    for module in hf.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = getattr(hf.config, "time_step_limit", (0.0, math.inf))
    return hf


def write(hf: Any, folder: Path) -> None:
    """Save it as transformers does, without its bars."""
    transformers.utils.logging.disable_progress_bar()
    hf.save_pretrained(folder)


def files(hf: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the weights, float64, that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(hf, Path(folder))
        weights = load_file(f"{folder}/model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text())
    return config, {name: value.double().numpy() for name, value in weights.items()}


class Tiny:
    """One model three times: transformers' object, its files, and ours in float64."""

    def __init__(self, case: str, seed: int = 0, **changes: Any) -> None:
        self.hf = twin(case, seed, **changes)
        self.config, self.weights = files(self.hf)
        self.model = HookedHybrid.from_hf(self.hf).double().requires_grad_(False)


@functools.lru_cache(maxsize=32)
def tiny(case: str, seed: int = 0) -> Tiny:
    """A model of a case; tests leave it without hooks."""
    return Tiny(case, seed)


def tokens_for(rows: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (rows, length), generator=generator)
