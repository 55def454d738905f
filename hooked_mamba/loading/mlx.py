"""MLX folders, as mlx-lm's converter writes them: what it does to names and weights, undone.

They are told from transformers' by the convolution, whose weight is (channels, taps, 1) there, by quantised weights and
by experts under `switch_mlp`. config.json is that of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.mlx_quantised import dequantised
from hooked_mamba.loading.tables import CheckpointError, LazyState, Place

__all__ = ["from_mlx", "is_mlx", "refuse_folded"]

CONVOLUTIONS = ("conv1d.weight", "conv.conv.weight")

NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    (".switch_mlp.fc1.weight", ".experts.up_proj"),
    (".switch_mlp.fc2.weight", ".experts.down_proj"),
    (".switch_mlp.gate_proj.weight", ".experts.gate_proj"),
    (".switch_mlp.up_proj.weight", ".experts.up_proj"),
    (".switch_mlp.down_proj.weight", ".experts.down_proj"),
)
"""Parts of names there -> here."""

ONE_MORE = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", "_norm.weight")
"""Endings of Qwen's norms that hold 1 + weight there; that of gated DeltaNet's output does not."""


def is_mlx(config: Mapping[str, Any], state: LazyState) -> bool:
    """Whether a folder is one of mlx-lm's."""
    packed = isinstance(config.get("quantization"), Mapping) and any(name.endswith(".scales") for name in state)
    if packed or any(".switch_mlp." in name for name in state):
        return True
    first = next((name for name in state if name.endswith(CONVOLUTIONS)), None)
    if first is not None:
        shape = state[first].shape
        return len(shape) == 3 and shape[2] == 1 and shape[1] != 1
    per_head = next((name for name in state if name.endswith(".attn.g_norm.weight")), None)
    return per_head is not None and state[per_head].ndim == 2


def from_mlx(config: Mapping[str, Any], state: LazyState) -> tuple[dict[str, Any], LazyState]:
    """Config and tensors as transformers would have saved them.

    Quantised weights are made when they are read. Falcon-H1's factors, which the converter multiplies into weights
    while config.json still names them, become 1.

    Raises
    ------
    CheckpointError
        Another way to quantise, or tensors that do not belong together.
    """
    fields = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config")}
    given = config.get("quantization")
    state = dequantised(state, given if isinstance(given, Mapping) else {})
    renamed = {name: _name(name) for name in state}
    if len(set(renamed.values())) != len(renamed):
        twice = next(name for name in renamed if name != renamed[name] and renamed[name] in state)
        raise CheckpointError(f"{state.place(twice)} and {state.place(renamed[twice])} hold one weight")
    state = state.renamed(renamed)
    changes: dict[str, Callable[[Tensor], Tensor]] = {name: _moved for name in state if name.endswith(CONVOLUTIONS)} | {
        name: torch.flatten for name in state if _by_head(name)
    }
    text = fields.get("text_config")
    kind = str((text or fields).get("model_type", fields.get("model_type")))
    if kind.startswith("qwen3"):
        changes |= {name: _one_less for name in state if name.endswith(ONE_MORE) and ".linear_attn." not in name}
    if kind == "falcon_h1":
        fields, more = _unfolded(fields, state)
        changes |= more
    if kind == "granitemoehybrid":
        state = _joined(state)
    return fields, state.with_changed(changes)


def _name(name: str) -> str:
    for there, here in NAMES:
        name = name.replace(there, here)
    return name


def _moved(weight: Tensor) -> Tensor:
    """(channels, taps, 1) -> (channels, 1, taps)."""
    return weight.movedim(2, 1) if weight.ndim == 3 and weight.shape[2] == 1 else weight


def _by_head(name: str) -> bool:
    """RWKV-7's vectors that are matrices of heads there."""
    return name.endswith((".attn.k_k", ".attn.k_a", ".attn.g_norm.weight", ".attn.g_norm.bias"))


def _one_less(weight: Tensor) -> Tensor:
    return weight.double() - 1  # exactly: the sum is taken again in float64


# Falcon-H1 -----------------------------------------------------------------------------------------------------------

FOLDED = (
    "ssm_in_multiplier",
    "ssm_out_multiplier",
    "attention_out_multiplier",
    "embedding_multiplier",
    "lm_head_multiplier",
)


def refuse_folded(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder for an adapter where weights hold factors that those the adapter was trained on did not.

    Raises
    ------
    CheckpointError
        A Falcon-H1 with a factor other than 1.
    """
    names = (*FOLDED, "attention_in_multiplier", "ssm_multipliers", "mlp_multipliers")
    given = {name: config[name] for name in names if config.get("model_type") == "falcon_h1" and name in config}
    others = [name for name, value in given.items() if any(one != 1 for one in _numbers(value))]
    if others:
        raise CheckpointError(
            f"{folder} is a Falcon-H1 that mlx-lm converted, whose weights are multiplied by factors ({others[0]}="
            f"{given[others[0]]!r}), and adapters are trained on weights that are not: give the adapter with the"
            " checkpoint that the folder was made from"
        )


def _numbers(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _unfolded(
    fields: Mapping[str, Any], state: LazyState
) -> tuple[dict[str, Any], dict[str, Callable[[Tensor], Tensor]]]:
    """Factors that stand in the weights already, as 1; those that mlx-lm leaves out are kept.

    mlx-lm 0.32 multiplies attention_in_multiplier into queries and keys and not into values, and key_multiplier into
    nothing, so that its own model is not the one that was converted.
    """
    into = float(fields.get("attention_in_multiplier", 1.0))
    if into != 1 or float(fields.get("key_multiplier", 1.0)) != 1:
        warnings.warn(
            "this Falcon-H1 was converted by mlx-lm, which leaves out key_multiplier, and attention_in_multiplier of"
            " the values (seen in 0.32.2): they are taken from config.json, as in the checkpoint that was converted."
            " mlx-lm's own logits differ",
            stacklevel=2,
        )
    ones = dict.fromkeys(FOLDED, 1.0) | {"ssm_multipliers": [1.0] * 5, "mlp_multipliers": [1.0, 1.0]}
    values = [name for name in state if name.endswith("self_attn.v_proj.weight")]
    changed = dict(fields) | {name: one for name, one in ones.items() if name in fields}
    if "lm_head.weight" not in state:  # the unembedding is the embedding, which holds the embedding's factor
        both = (float(fields.get(f"{name}_multiplier", 1.0)) for name in ("lm_head", "embedding"))
        changed["lm_head_multiplier"] = next(both) / next(both)
    return changed | {"attention_in_multiplier": 1.0}, dict.fromkeys(values, lambda weight: weight.double() * into)


# Granite -------------------------------------------------------------------------------------------------------------


def _joined(state: LazyState) -> LazyState:
    """Gate and up in one matrix again, those of a dense layer and of experts."""
    getters = {name: state.getter(name) for name in state}
    places = {name: state.place(name) for name in state}
    for name in state:
        for gate, fused, down, axis in (
            (".mlp.gate_proj.weight", ".shared_mlp.input_linear.weight", ".shared_mlp.output_linear.weight", 0),
            (".experts.gate_proj", ".input_linear.weight", ".output_linear.weight", 1),
        ):
            if not name.endswith(gate):
                continue
            base = name.removesuffix(gate)
            parts = [base + gate.replace("gate", part) for part in ("gate", "up", "down")]
            if any(part not in state for part in parts):
                continue
            getters[base + fused] = _cat(axis, *(state.getter(part) for part in parts[:2]))
            places[base + fused] = Place(
                f"{state.place(parts[0]).tensor} and up_proj", state.place(parts[0]).file, True
            )
            getters[base + down], places[base + down] = state.getter(parts[2]), state.place(parts[2])
            for part in parts:
                del getters[part], places[part]
    return LazyState(getters, places, state.expected)


def _cat(axis: int, *parts: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat([part() for part in parts], axis)
