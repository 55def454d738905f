"""What llama.cpp's converter makes of a folder: keys and tensors of a GGUF file, from the converter's source, without
the code under test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.hooked_mamba.loading.gguf.written import Converted, State, decay, gguf, named, source, write

Made = tuple[str, dict[str, Any], dict[str, Tensor]]
"""Architecture, keys, tensors."""


def _stack(config: dict[str, Any], eps: str) -> dict[str, Any]:
    return {
        ".embedding_length": config["hidden_size"],
        ".block_count": config["num_hidden_layers"],
        ".attention.layer_norm_rms_epsilon": config[eps],
    }


def _ssm(taps: int, inner: int, state: int, rank: int, groups: int | None = None) -> dict[str, Any]:
    keys = {
        ".ssm.conv_kernel": taps,
        ".ssm.inner_size": inner,
        ".ssm.state_size": state,
        ".ssm.time_step_rank": rank,
    }
    return keys if groups is None else keys | {".ssm.group_count": groups}


def _attention(config: dict[str, Any], layers: list[bool] | None = None) -> dict[str, Any]:
    J = config["num_key_value_heads"]
    return {
        ".attention.head_count": config["num_attention_heads"],
        ".attention.head_count_kv": J if layers is None else [J if here else 0 for here in layers],
    }


def _plain(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """What befalls every Mamba-1 layer."""
    if name.endswith("A_log"):
        return name, decay(tensor)
    return name, tensor.squeeze() if name.endswith("conv1d.weight") else tensor


def mamba2_layer(name: str, tensor: Tensor, groups: int) -> tuple[str, Tensor]:
    """What befalls every Mamba-2 layer."""
    if name.endswith("A_log"):
        return name, decay(tensor)[:, None]
    if name.endswith((".mixer.D", ".mamba.D")):
        return name, tensor[:, None]
    if name.endswith("dt_bias"):
        return name.replace("dt_bias", "dt_proj.bias"), tensor
    if name.endswith("conv1d.weight"):
        return name, tensor.squeeze()
    return name, tensor.reshape(groups, -1) if name.endswith((".mixer.norm.weight", ".mamba.norm.weight")) else tensor


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head that turn together, side by side."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)


def merged(state: State, word: str, names: dict[str, str]) -> Converted:
    """Single experts as one tensor a matrix; other tensors as they are."""
    single = [name for name in state if word in name]
    for name in state:
        if name not in single:
            yield name, state[name]
    for prefix in sorted({name.partition(word)[0] for name in single}):
        for theirs, there in names.items():
            found = sorted(
                (n for n in single if n.startswith(prefix) and theirs in n), key=lambda n: int(n.split(".")[-3])
            )
            layer = prefix.split(".")[2]
            yield f"model.layers.{layer}.mlp.experts.{there}.weight", torch.stack([state[name] for name in found])


# Families ------------------------------------------------------------------------------------------------------------


def mamba(config: dict[str, Any], state: State) -> Made:
    """Mamba and Falcon-Mamba."""
    sizes = _ssm(config["conv_kernel"], config["intermediate_size"], config["state_size"], config["time_step_rank"])
    keys = _stack(config, "layer_norm_epsilon") | sizes
    keys[".ssm.dt_b_c_rms"] = config["model_type"] == "falcon_mamba"
    pairs = (_plain(*item) for item in state.items())
    return "mamba", keys, named(gguf.MODEL_ARCH.MAMBA, config["num_hidden_layers"], pairs)


def mamba2(config: dict[str, Any], state: State) -> Made:
    """Mamba-2."""
    E, G = config["expand"] * config["hidden_size"], config["n_groups"]
    sizes = _ssm(config["conv_kernel"], E, config["state_size"], E // config["head_dim"], G)
    pairs = (mamba2_layer(*item, G) for item in state.items())
    tensors = named(gguf.MODEL_ARCH.MAMBA2, config["num_hidden_layers"], pairs)
    return "mamba2", _stack(config, "layer_norm_epsilon") | sizes, tensors


def jamba(config: dict[str, Any], state: State) -> Made:
    """Jamba: single experts are merged."""
    n, period, offset = config["num_hidden_layers"], config["attn_layer_period"], config["attn_layer_offset"]
    E = config["mamba_expand"] * config["hidden_size"]
    keys = _stack(config, "rms_norm_eps") | _attention(config, [i % period == offset for i in range(n)])
    keys |= _ssm(config["mamba_d_conv"], E, config["mamba_d_state"], config["mamba_dt_rank"])
    keys |= {
        ".feed_forward_length": config["intermediate_size"],
        ".expert_count": config["num_experts"],
        ".expert_used_count": config["num_experts_per_tok"],
    }
    names = {f"{p}_proj": f"{p}_proj" for p in ("gate", "up", "down")}
    pairs = (_plain(*item) for item in merged(state, ".feed_forward.experts.", names))
    return "jamba", keys, named(gguf.MODEL_ARCH.JAMBA, n, pairs)


def falcon_h1(config: dict[str, Any], state: State) -> Made:
    """Falcon-H1: factors are multiplied into weights, and one norm's name has no ending."""
    n, E, G, N = (config[k] for k in ("num_hidden_layers", "mamba_d_ssm", "mamba_n_groups", "mamba_d_state"))
    keys = _stack(config, "rms_norm_eps") | _attention(config)
    keys |= _ssm(config["mamba_d_conv"], E, N, config["mamba_n_heads"], G)
    keys |= {
        ".feed_forward_length": config["intermediate_size"],
        ".attention.key_length": config["head_dim"],
        ".attention.value_length": config["head_dim"],
        ".rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    gate, down = config["mlp_multipliers"]
    attn_in = config["attention_in_multiplier"]
    rows = torch.tensor(config["ssm_multipliers"]).repeat_interleave(
        torch.tensor([E, E, G * N, G * N, config["mamba_n_heads"]])
    )
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config["key_multiplier"] * attn_in,
        "q_proj": attn_in,
        "v_proj": attn_in,
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "in_proj": config["ssm_in_multiplier"] * rows[:, None],
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }

    def folded(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        factor = next((factor for word, factor in factors.items() if f".{word}." in f".{name}"), 1.0)
        return mamba2_layer(name, tensor * factor, G)

    tensors = named(gguf.MODEL_ARCH.FALCON_H1, n, (folded(*item) for item in state.items()))
    return "falcon-h1", keys, {_without_ending(name): tensor for name, tensor in tensors.items()}


def _without_ending(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith("ffn_norm.weight") else name


def granite(config: dict[str, Any], state: State) -> Made:
    """Granite 4: rows of q and k are permuted, fused matrices cut."""
    n, G = config["num_hidden_layers"], config["mamba_n_groups"]
    words = ["attention" in word and "linear" not in word for word in config["layer_types"]]
    E = config["mamba_expand"] * config["hidden_size"]
    keys = _stack(config, "rms_norm_eps") | _attention(config, words)
    keys |= _ssm(config["mamba_d_conv"], E, config["mamba_d_state"], config["mamba_n_heads"], G)
    keys |= {
        ".attention.scale": float(config["attention_multiplier"]),
        ".embedding_scale": float(config["embedding_multiplier"]),
        ".residual_scale": float(config["residual_multiplier"]),
        ".logit_scale": float(config["logits_scaling"]),
        ".feed_forward_length": config["intermediate_size"],
        ".rope.scaling.finetuned": False,
    }
    experts = config["num_local_experts"]
    if experts:
        keys |= {".expert_count": experts, ".expert_used_count": config["num_experts_per_tok"]}
        keys[".expert_shared_feed_forward_length"] = config["shared_intermediate_size"]
    ending = "_shexp" if experts else ""
    found = {}
    for name, tensor in state.items():
        there = f"blk.{name.split('.')[2]}" if "layers" in name else ""
        if name.endswith("input_linear.weight"):
            last = "_exps" if "block_sparse_moe" in name else ending
            gate, up = tensor.chunk(2, dim=-2)
            found |= {f"{there}.ffn_gate{last}.weight": gate, f"{there}.ffn_up{last}.weight": up}
        elif name.endswith("shared_mlp.output_linear.weight"):
            found[f"{there}.ffn_down{ending}.weight"] = tensor
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            found |= named(gguf.MODEL_ARCH.GRANITE_HYBRID, n, [(name, permuted(tensor, heads))])
        else:
            found |= named(gguf.MODEL_ARCH.GRANITE_HYBRID, n, [mamba2_layer(name, tensor, G)])
    return "granitehybrid", keys, found


def bamba(config: dict[str, Any], state: State) -> Made:
    """Bamba, as a Granite whose queries and keys turn; the file says that all of a head does."""
    n, attends = config["num_hidden_layers"], config["attn_layer_indices"]
    ones = dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    as_granite = config | ones | {"layer_types": ["attention" if i in attends else "mamba" for i in range(n)]}
    _, keys, tensors = granite(as_granite | {"num_local_experts": 0}, state)
    for name in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"):
        del keys[f".{name}"]
    keys |= {
        ".rope.scaling.finetuned": True,
        ".rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        ".rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
    }
    return "granitehybrid", keys, tensors


def nemotron_h(config: dict[str, Any], state: State) -> Made:
    """Nemotron-H, with experts or without."""
    words, G = config["layers_block_type"], config["n_groups"]
    n, experts = len(words), "moe" in words
    keys = _stack(config | {"num_hidden_layers": n}, "layer_norm_epsilon")
    keys |= _attention(config, [word in ("attention", "full_attention") for word in words])
    E = config["mamba_num_heads"] * config["mamba_head_dim"]
    keys |= _ssm(config["conv_kernel"], E, config["ssm_state_size"], config["mamba_num_heads"], G)
    width = config["moe_intermediate_size" if experts else "intermediate_size"]
    keys |= {
        ".attention.key_length": config["head_dim"],
        ".attention.value_length": config["head_dim"],
        ".feed_forward_length": [width if word in ("moe", "mlp") else 0 for word in words],
    }
    if experts:
        keys |= {
            ".expert_used_count": config["num_experts_per_tok"],
            ".expert_feed_forward_length": width,
            ".expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
            ".expert_count": config["n_routed_experts"],
            ".expert_weights_norm": config["norm_topk_prob"],
            ".expert_weights_scale": float(config["routed_scaling_factor"]),
            ".expert_group_count": config["n_group"],
            ".expert_group_used_count": config["topk_group"],
            ".moe_latent_size": config["moe_latent_size"],
        }
    architecture = gguf.MODEL_ARCH.NEMOTRON_H_MOE if experts else gguf.MODEL_ARCH.NEMOTRON_H

    def pairs() -> Converted:
        for name, tensor in merged(state, ".mixer.experts.", {"down_proj": "down_proj", "up_proj": "up_proj"}):
            if name.endswith("e_score_correction_bias"):
                yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor
            elif name.endswith("dt_bias"):
                yield name.replace("dt_bias", "dt.bias"), tensor
            else:
                yield mamba2_layer(name, tensor, G)

    return gguf.MODEL_ARCH_NAMES[architecture], keys, named(architecture, n, pairs())


def lfm2(config: dict[str, Any], state: State) -> Made:
    """LFM2."""
    n = config["num_hidden_layers"]
    keys = _stack(config, "norm_eps") | _attention(config, [word != "conv" for word in config["layer_types"]])
    width = next(len(tensor) for name, tensor in state.items() if name.endswith("w1.weight"))
    keys |= {
        ".shortconv.l_cache": config["conv_L_cache"],
        ".feed_forward_length": width,
        ".rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    pairs = ((name, tensor.squeeze(1) if "conv.conv.weight" in name else tensor) for name, tensor in state.items())
    return "lfm2", keys, named(gguf.MODEL_ARCH.LFM2, n, pairs)


FAMILIES: dict[str, Callable[[dict[str, Any], State], Made]] = {
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "falcon_h1": falcon_h1,
    "granitemoehybrid": granite,
    "bamba": bamba,
    "nemotron_h": nemotron_h,
    "lfm2": lfm2,
}
"""model_type of a folder -> how it is converted."""


def convert(folder: Path, path: Path, kind: str = "F32") -> Path:
    """A folder of transformers as a GGUF file."""
    from tests.hooked_mamba.loading.gguf.converted_recurrent import RECURRENT

    config, state = source(folder)
    architecture, keys, tensors = (FAMILIES | RECURRENT)[config["model_type"]](config, state)
    return write(path, architecture, keys, tensors, kind)
