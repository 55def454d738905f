"""MLX folders as mlx-lm 0.32 writes them, from its source and without mlx or the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import _SIZE, load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def quantise(weight: Tensor, bits: int, group_size: int) -> tuple[State, Tensor]:
    """(words, scales and biases; the weight that they stand for), groups between their least and largest number."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).clamp(min=1e-7)
    q = ((groups - least) / scale).round().clamp(0, 2**bits - 1)
    meant = (q * scale + least).flatten(-2)
    rows = q.flatten(-2).long().reshape(-1, weight.shape[-1])
    packed = torch.zeros(len(rows), weight.shape[-1] * bits // 32, dtype=torch.long)
    for i in range(weight.shape[-1]):  # one stream of bits, lowest first, in words of 32
        for bit in range(bits):
            at = i * bits + bit
            packed[:, at // 32] |= ((rows[:, i] >> bit) & 1) << (at % 32)
    words = packed.to(torch.uint32).reshape(*weight.shape[:-1], -1)
    return {"weight": words, "scales": scale.squeeze(-1), "biases": least.squeeze(-1)}, meant


def experts_stacked(state: State, word: str, names: dict[str, str]) -> State:
    """Single experts as one tensor under switch_mlp."""
    found = {name: tensor for name, tensor in state.items() if f"{word}." not in name}
    for prefix in {name.partition(f"{word}.")[0] for name in state if f"{word}." in name}:
        for theirs, there in names.items():
            count = len([n for n in state if n.startswith(f"{prefix}{word}.") and n.endswith(f".{theirs}.weight")])
            rows = [state[f"{prefix}{word}.{e}.{theirs}.weight"] for e in range(count)]
            found[f"{prefix}.switch_mlp.{there}.weight"] = torch.stack(rows)
    return found


def granite(config: dict[str, Any], state: State) -> State:
    """Gate and up apart, of experts, or of the MLP where there are none."""
    found = {}
    for name, tensor in state.items():
        base = name.rpartition(".input_linear")[0] or name.rpartition(".output_linear")[0]
        dense = not config["num_local_experts"] and base.endswith("shared_mlp")
        if not base or (base.endswith("shared_mlp") and not dense):
            found[name] = tensor
            continue
        to = base.replace("shared_mlp", "mlp") if dense else f"{base}.switch_mlp"
        if "output_linear" in name:
            found[f"{to}.down_proj.weight"] = tensor
        else:
            gate, up = tensor.chunk(2, dim=-2)
            found |= {f"{to}.gate_proj.weight": gate, f"{to}.up_proj.weight": up}
    return found


def falcon_h1(config: dict[str, Any], state: State) -> State:
    """Factors in weights, those that mlx-lm 0.32 puts there."""
    E, GN = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    parts = torch.tensor([E, E, GN, GN, config["mamba_n_heads"]])
    rows = torch.tensor(config["ssm_multipliers"]).repeat_interleave(parts)[:, None]
    gate, down = config["mlp_multipliers"]
    factors = {
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "q_proj": config["attention_in_multiplier"],
        "k_proj": config["attention_in_multiplier"],
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "gate_proj": gate,
        "down_proj": down,
        "in_proj": config["ssm_in_multiplier"] * rows,
    }
    return {name: tensor * factors.get(name.split(".")[-2], 1.0) for name, tensor in state.items()}


def jamba(config: dict[str, Any], state: State) -> State:
    """Experts together."""
    return experts_stacked(state, ".experts", {f"{p}_proj": f"{p}_proj" for p in ("gate", "up", "down")})


def nemotron_h(config: dict[str, Any], state: State) -> State:
    """Experts together, under other names."""
    return experts_stacked(state, ".experts", {"up_proj": "fc1", "down_proj": "fc2"})


def qwen(config: dict[str, Any], state: State) -> State:
    """Norms hold 1 + weight; experts together."""
    endings = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", "_norm.weight")
    more = {n: t + 1 if n.endswith(endings) and "linear_attn" not in n else t for n, t in state.items()}
    merged = {}
    for name, tensor in more.items():
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("experts.gate_up_proj")
            gate, up = tensor.chunk(2, dim=-2)
            merged |= {f"{base}switch_mlp.gate_proj.weight": gate, f"{base}switch_mlp.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            merged[name.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = tensor
        else:
            merged[name] = tensor
    found = jamba(config, merged)
    if config["model_type"] == "qwen3_next":
        return found
    return {f"language_model.{name}": tensor for name, tensor in found.items()}


def rwkv7(config: dict[str, Any], state: State) -> State:
    """Vectors by head."""
    K = config["head_dim"]
    by_head = (".k_k", ".k_a", "g_norm.weight", "g_norm.bias")
    return {n: t.reshape(-1, K) if n.endswith(by_head) else t for n, t in state.items()}


FAMILIES: dict[str, Callable[[dict[str, Any], State], State]] = {
    "jamba": jamba,
    "nemotron_h": nemotron_h,
    "granitemoehybrid": granite,
    "falcon_h1": falcon_h1,
    "qwen3_next": qwen,
    "qwen3_5_text": qwen,
    "qwen3_5_moe_text": qwen,
    "rwkv7": rwkv7,
}


def convert(folder: Path, to: Path, bits: int | None = None, group_size: int = 32, by_layer: bool = False) -> State:
    """Write the MLX folder of a folder of transformers.

    Parameters
    ----------
    folder, to
        From, to.
    bits, group_size
        Of matrices whose rows are whole groups; None: nothing is quantised.
    by_layer
        Whether projections out of a mixer have 8 bits in groups of 16, said for each of them.

    Returns
    -------
    dict
        What quantised weights stand for, by name in the folder.
    """
    config = json.loads((folder / "config.json").read_text())
    state = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, tensor in state.items():
        if name.endswith(("conv1d.weight", "conv.conv.weight")):
            state[name] = tensor.movedim(2, 1)
    state = FAMILIES.get(config["model_type"], lambda config, state: state)(config, state)
    meant: State = {}
    if bits is not None:
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        for name, tensor in list(state.items()):
            whole = tensor.shape[-1] % group_size == 0 and tensor.shape[-1] * bits % 32 == 0
            if tensor.ndim < 2 or "conv" in name or not name.endswith(".weight") or not whole:
                continue
            layer, how = name.removesuffix(".weight"), (bits, group_size)
            if by_layer and layer.endswith("out_proj"):
                how = (8, 16)
                config["quantization"][layer] = {"bits": 8, "group_size": 16}
            parts, meant[name] = quantise(tensor, *how)
            del state[name]
            state |= {f"{layer}.{part}": value for part, value in parts.items()}
        config["quantization_config"] = config["quantization"]
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    if any(t.dtype not in _SIZE for t in state.values()):
        pytest.skip(f"safetensors {safetensors.__version__} reads uint32 and does not write it")
    save_file({n: t.contiguous() for n, t in state.items()}, to / "model.safetensors", metadata={"format": "mlx"})
    return meant
