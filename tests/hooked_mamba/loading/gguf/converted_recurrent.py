"""The same for RWKV-7 and Qwen's gated DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.hooked_mamba.loading.gguf.converted import Made
from tests.hooked_mamba.loading.gguf.written import Converted, State, decay, gguf, named

FLA = (("self_attn", "attention"), ("attn", "attention"), ("ffn", "feed_forward"))
"""Words of fla's names -> those of gguf's tables."""


def rwkv7(config: dict[str, Any], state: State) -> Made:
    """RWKV-7 in fla's form: the mixes of a layer in one tensor, and copies where layer 0 would mix in a value."""
    n, d = config["num_hidden_layers"], config["hidden_size"]
    keys = {
        ".embedding_length": d,
        ".block_count": n,
        ".attention.layer_norm_epsilon": config["norm_eps"],
        ".wkv.head_size": config["head_dim"],
        ".feed_forward_length": config["intermediate_size"],
        ".attention.head_count": 0,
    }

    def pairs() -> Converted:
        for name, tensor in state.items():
            for theirs, there in FLA:
                name = name.replace(f".{theirs}", f".{there}")
            name = name.replace("feed_forward_norm", "ln2").replace("g_norm", "ln_x").replace("attention_norm", "ln1")
            name = name.replace("_lora.lora.0.weight", "1.weight").replace("_lora.lora.2.weight", "2.weight")
            name = name.replace("_lora.lora.2.bias", "0.weight")
            if "attention.x_" in name:
                continue
            flat = tensor.flatten() if name.endswith("r_k") else tensor.squeeze()
            yield name, flat
            if ".layers.0.attention.a" in name and "norm" not in name:
                yield name.replace("attention.a", "attention.v"), flat

    found = named(gguf.MODEL_ARCH.RWKV7, n, pairs())
    for i in range(n):
        mixes = [state[f"model.layers.{i}.attn.x_{j}"] for j in "rwkvag"]
        found[f"blk.{i}.time_mix_lerp_fused.weight"] = torch.stack(mixes).reshape(6, 1, 1, d)
    return (
        "rwkv7",
        keys,
        {name if name.endswith((".weight", ".bias")) else f"{name}.weight": t for name, t in found.items()},
    )


def tiled(tensor: Tensor, dim: int, groups: int, each: int) -> Tensor:
    """Value heads by key head -> in turns, one of each key head."""
    width = tensor.shape[dim] // (groups * each)
    apart = tensor.unflatten(dim, (groups, each, width))
    return apart.transpose(dim, dim + 1).flatten(dim, dim + 2)


def qwen(config: dict[str, Any], state: State) -> Made:
    """Qwen3-Next and Qwen3.5: norms hold 1 + weight, q, k, v, z by kind; in Qwen3.5 value heads take turns."""
    n, G, H = (config[k] for k in ("num_hidden_layers", "linear_num_key_heads", "linear_num_value_heads"))
    K, V, r = config["linear_key_head_dim"], config["linear_value_head_dim"], H // G
    next_ = config["model_type"] == "qwen3_next"
    routed = bool(config.get("num_experts"))
    words = [word == "full_attention" for word in config["layer_types"]]
    keys = {
        ".embedding_length": config["hidden_size"],
        ".block_count": n,
        ".attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        ".attention.head_count": config["num_attention_heads"],
        ".attention.head_count_kv": config["num_key_value_heads"],
        ".attention.key_length": config["head_dim"],
        ".attention.value_length": config["head_dim"],
        ".rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        ".rope.dimension_count": int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]),
        ".ssm.conv_kernel": config["linear_conv_kernel_dim"],
        ".ssm.state_size": K,
        ".ssm.group_count": G,
        ".ssm.time_step_rank": H,
        ".ssm.inner_size": H * V,
        ".feed_forward_length": config.get("intermediate_size", 1),
    }
    if routed:
        keys |= {
            ".expert_count": config["num_experts"],
            ".expert_used_count": config["num_experts_per_tok"],
            ".expert_feed_forward_length": config["moe_intermediate_size"],
            ".expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        }
    name = "qwen3next" if next_ else "qwen35moe" if routed else "qwen35"
    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[name]
    found: dict[str, Tensor] = {}

    def add(theirs: str, tensor: Tensor) -> None:
        found.update(named(architecture, n, [(theirs, tensor)]))

    for theirs, tensor in _experts(state).items():
        there = f"blk.{theirs.split('.')[2]}" if ".layers." in theirs else ""
        if theirs.endswith("in_proj_qkvz.weight"):
            q, k, v, z = tensor.unflatten(0, (G, -1)).split([K, K, r * V, r * V], 1)
            found[f"{there}.attn_qkv.weight"] = torch.cat([part.flatten(0, 1) for part in (q, k, v)])
            found[f"{there}.attn_gate.weight"] = z.flatten(0, 1)
            continue
        if "linear_attn" in theirs and not next_:
            tensor = _turned(theirs, tensor, G, r, 2 * G * K)
        if theirs.endswith("A_log"):
            tensor = decay(tensor)
        elif theirs.endswith("dt_bias"):
            theirs = theirs.replace("dt_bias", "dt_proj.bias")
        elif "conv1d" in theirs:
            tensor = tensor.squeeze()
        elif theirs.endswith("norm.weight") and not theirs.endswith("linear_attn.norm.weight"):
            tensor = tensor + 1
        add(theirs, tensor)
    assert any(words)
    return name, keys, found


def _turned(name: str, tensor: Tensor, groups: int, each: int, keys: int) -> Tensor:
    if ".norm." in name:
        return tensor
    if "out_proj" in name:
        return tiled(tensor, 1, groups, each)
    start = keys if "in_proj_qkv" in name or "conv1d" in name else 0
    return torch.cat([tensor[:start], tiled(tensor[start:], 0, groups, each)])


def _experts(state: State) -> State:
    """Experts as the files of transformers have them, single or gate and up in one, as one tensor a matrix."""
    found, single = {}, {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=-2)
            base = name.removesuffix(".gate_up_proj")
            found |= {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = tensor
        elif ".experts." in name:
            base, _, rest = name.partition(".experts.")
            number, _, ending = rest.partition(".")
            single.setdefault(f"{base}.experts.{ending}", {})[int(number)] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.stack([rows[e] for e in sorted(rows)]) for name, rows in single.items()}


RECURRENT: dict[str, Callable[[dict[str, Any], State], Made]] = {
    "rwkv7": rwkv7,
    "qwen3_next": qwen,
    "qwen3_5_text": qwen,
    "qwen3_5_moe_text": qwen,
}
