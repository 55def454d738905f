"""RWKV-7 as the packages fla and rwkv7-hf write it (`model_type: rwkv7`).

The projections of low rank are transposed there. Old files hold the six mixes of a layer as one tensor `attn.x_x`.
Ranks are read from the tensors: files exist whose config names others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.raw_rwkv7 import MIXES, sizes_of
from hooked_mamba.loading.tables import (
    CheckpointError,
    Field,
    LazyState,
    Place,
    from_ours_weights,
    read_fields,
    reject,
    to_ours_weights,
    write_fields,
)
from hooked_mamba.loading.tying import drop_tied
from hooked_mamba.recurrent_config import RWKV7Config

__all__ = ["from_ours", "to_ours"]

WHAT = "this RWKV-7 config"

FIELDS = (
    Field("d_model", "hidden_size"),
    Field("n_layers", "num_hidden_layers"),
    Field("d_vocab", "vocab_size"),
    Field("eps", "norm_eps", 1e-5),
    Field("tie_embeddings", "tie_word_embeddings", False),
    Field("bos_token_id", "bos_token_id", None),
    Field("eos_token_id", "eos_token_id", None),
    Field("pad_token_id", "pad_token_id", None),
)

ALLOWED = {"norm_first": (True,), "norm_bias": (True,), "hidden_act": ("sqrelu",), "attn": (None,)}

RANKS = {
    "decay_rank": "decay_low_rank_dim",
    "rate_rank": "a_low_rank_dim",
    "value_rank": "v_low_rank_dim",
    "gate_rank": "gate_low_rank_dim",
}

LOW_RANK = {"w": "w_lora", "a": "a_lora", "v": "v_lora", "g": "g_lora"}

_BLOCK = {
    "attn_norm.weight": "norm.weight",
    "attn_norm.bias": "norm.bias",
    **{f"attn.{name}": f"mixer.{name}" for name in (*MIXES, "k_k", "k_a", "r_k")},
    "attn.r_proj.weight": "mixer.receptance.weight",
    "attn.k_proj.weight": "mixer.key.weight",
    "attn.v_proj.weight": "mixer.value.weight",
    "attn.o_proj.weight": "mixer.output.weight",
    **{f"attn.{lora}.lora.0.weight": f"mixer.{j}1" for j, lora in LOW_RANK.items()},
    **{f"attn.{lora}.lora.2.weight": f"mixer.{j}2" for j, lora in LOW_RANK.items()},
    **{f"attn.{lora}.lora.2.bias": f"mixer.{j}0" for j, lora in LOW_RANK.items() if j != "g"},
    "attn.g_norm.weight": "mixer.norm.weight",
    "attn.g_norm.bias": "mixer.norm.bias",
    "ffn_norm.weight": "norm2.weight",
    "ffn_norm.bias": "norm2.bias",
    "ffn.x_k": "mlp.x_k",
    "ffn.key.weight": "mlp.key.weight",
    "ffn.value.weight": "mlp.value.weight",
}

WEIGHTS: dict[str, str | None] = {
    "model.embeddings.weight": "embed.weight",
    "model.layers.0.pre_norm.weight": "ln_embed.weight",
    "model.layers.0.pre_norm.bias": "ln_embed.bias",
    **{f"model.layers.{{i}}.{theirs}": f"blocks.{{i}}.{ours}" for theirs, ours in _BLOCK.items()},
    "model.norm.weight": "ln_final.weight",
    "model.norm.bias": "ln_final.bias",
    "lm_head.weight": "unembed.weight",
}


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[RWKV7Config, LazyState]:
    """Config and weights of a folder in Hugging Face's form, under our names.

    Raises
    ------
    CheckpointError
        A missing field, an unsupported value (attention in some layers, values wider than the stream, another norm),
        or a weight that sizes are read from is missing.
    """
    reject(config, ALLOWED, WHAT)
    values = read_fields(config, FIELDS, WHAT)
    widths = config.get("value_dim") or config.get("attention_hidden_size") or values["d_model"]
    if set(widths if isinstance(widths, list | tuple) else [widths]) != {values["d_model"]}:
        raise CheckpointError(f"{WHAT} has value_dim={widths}; expected hidden_size={values['d_model']} in every layer")
    state = _under_our_names(state_dict, values["n_layers"])
    sizes = sizes_of(state, values["n_layers"])
    for field in ("d_model", "d_vocab"):
        if sizes[field] != values[field]:
            raise CheckpointError(f"{WHAT} says {field}={values[field]}, its tensors say {sizes[field]}")
    cfg = RWKV7Config(**(sizes | values), head_eps=values["eps"] * sizes["head_dim"])
    return cfg, drop_tied(state, cfg.tie_embeddings)


def _under_our_names(state_dict: Mapping[str, Tensor], n_layers: int) -> LazyState:
    """Tensors renamed and in our shapes."""
    getters: dict[str, Callable[[], Tensor]] = {}
    places: dict[str, Place] = {}
    given = LazyState.of(state_dict)
    for name in given:
        if not name.endswith(".attn.x_x"):
            getters[name], places[name] = given.getter(name), given.place(name)
            continue
        for row, mix in enumerate(MIXES):
            single = name.removesuffix("x_x") + mix
            getters[single], places[single] = _row(given.getter(name), row), given.place(name)
    state = to_ours_weights(LazyState(getters, places), WEIGHTS, n_layers)
    return state.with_changed(dict.fromkeys(_mixes(n_layers), torch.flatten)).with_changed(_turned(n_layers))


def _row(whole: Callable[[], Tensor], row: int) -> Callable[[], Tensor]:
    return lambda: whole()[row]


def _mixes(n_layers: int) -> list[str]:
    return [f"blocks.{i}.mixer.{mix}" for i in range(n_layers) for mix in MIXES]


def _turned(n_layers: int) -> dict[str, Callable[[Tensor], Tensor]]:
    return {f"blocks.{i}.mixer.{j}{n}": torch.t for i in range(n_layers) for j in LOW_RANK for n in (1, 2)}


def from_ours(cfg: RWKV7Config, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`.

    Raises
    ------
    CheckpointError
        An eps of the heads' norm that is not head_dim times the others'.
    """
    if cfg.norm_eps_of_heads != cfg.eps * cfg.K:
        raise CheckpointError(
            f"this format takes head_dim * eps as eps of the heads' norm: expected head_eps={cfg.eps * cfg.K}, got"
            f" {cfg.norm_eps_of_heads}"
        )
    config = write_fields(cfg, FIELDS) | {
        "head_dim": cfg.K,
        "num_heads": cfg.H,
        "intermediate_size": cfg.F,
        "hidden_ratio": cfg.F / cfg.d_model,
        "value_dim": [cfg.d_model] * cfg.n_layers,
        "norm_first": True,
        "norm_bias": True,
        "hidden_act": "sqrelu",
        "model_type": "rwkv7",
        "architectures": ["RWKV7ForCausalLM"],
        **{theirs: getattr(cfg, ours) for ours, theirs in RANKS.items()},
    }
    state = LazyState.of(state_dict).with_changed(_turned(cfg.n_layers))
    state = state.with_changed(dict.fromkeys(_mixes(cfg.n_layers), _three_axes))
    return config, from_ours_weights(state, WEIGHTS, cfg.n_layers)


def _three_axes(vector: Tensor) -> Tensor:
    return vector.view(1, 1, -1)
