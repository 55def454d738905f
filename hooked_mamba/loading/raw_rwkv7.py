"""RWKV-7 as its authors publish it: one `.pth` file, a plain dict of tensors without any config.

All sizes come from the tensors' shapes. Layer 0 has no value to mix in; where a file holds `blocks.0.att.v0` and its
like, nothing reads them, and they are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading.shapes import only_shapes
from hooked_mamba.loading.tables import CheckpointError, LazyState, from_ours_weights, to_ours_weights
from hooked_mamba.recurrent_config import RWKV7Config

__all__ = ["END_OF_TEXT", "MIXES", "VECTORS", "WEIGHTS", "from_ours", "sizes_of", "to_ours"]

EPS = 1e-5
"""eps of every norm; that of the heads' norm is 1e-5 times the head's size."""

END_OF_TEXT = 0
"""The id that ends a text, in the world vocabulary; official evaluations also put it in front."""

MIXES = tuple(f"x_{j}" for j in "rwkvag")
LOW_RANK = ("w0", "w1", "w2", "a0", "a1", "a2", "v0", "v1", "v2", "g1", "g2")
VECTORS = (*(f"mixer.{name}" for name in (*MIXES, "k_k", "k_a", "w0", "a0", "v0")), "mlp.x_k")
"""What is [d] here and [1, 1, d] in the files."""

_BLOCK = {
    "ln1.weight": "norm.weight",
    "ln1.bias": "norm.bias",
    **{f"att.{name}": f"mixer.{name}" for name in (*MIXES, *LOW_RANK, "k_k", "k_a", "r_k")},
    **{f"att.{name}.weight": f"mixer.{name}.weight" for name in ("receptance", "key", "value", "output")},
    "att.ln_x.weight": "mixer.norm.weight",
    "att.ln_x.bias": "mixer.norm.bias",
    "ln2.weight": "norm2.weight",
    "ln2.bias": "norm2.bias",
    "ffn.x_k": "mlp.x_k",
    "ffn.key.weight": "mlp.key.weight",
    "ffn.value.weight": "mlp.value.weight",
}

WEIGHTS: dict[str, str | None] = {
    "emb.weight": "embed.weight",
    "blocks.0.ln0.weight": "ln_embed.weight",
    "blocks.0.ln0.bias": "ln_embed.bias",
    **{f"blocks.{{i}}.{theirs}": f"blocks.{{i}}.{ours}" for theirs, ours in _BLOCK.items()},
    "ln_out.weight": "ln_final.weight",
    "ln_out.bias": "ln_final.bias",
    "head.weight": "unembed.weight",
}

LATER = (".s_emb", ".qkv.", "ffn.s0")
"""Parts of names by which RWKV-7a, 7b and 8 are told: other architectures."""


def to_ours(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[RWKV7Config, LazyState]:
    """Config and weights of a raw RWKV-7, under our names.

    Parameters
    ----------
    config
        Nothing: there is none.
    state_dict
        The file's tensors.

    Raises
    ------
    CheckpointError
        Another architecture, or a weight that sizes are read from is missing.
    """
    later = [name for name in state_dict if any(part in name for part in LATER)]
    if later:
        raise CheckpointError(f"{later[0]!r} belongs to RWKV-7a, 7b or 8, other architectures; expected plain RWKV-7")
    if "blocks.0.att.r_k" not in state_dict:
        found = ", ".join(sorted(state_dict)[:4]) or "nothing"
        raise CheckpointError(
            f"these tensors are not of an RWKV-7: blocks.0.att.r_k is not there, first are {found}; RWKV-4 to 6 are"
            " not supported"
        )
    layers = {int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")}
    n_layers = max(layers) + 1
    state = to_ours_weights(state_dict, WEIGHTS, n_layers)
    shaped = {name: torch.flatten for i in range(n_layers) for name in vectors(i) if name in state}
    state = state.with_changed(shaped)
    first = [name for name in state if name.startswith("blocks.0.mixer.v") and name[-1] in "012"]
    rank = sizes_of(state, n_layers) | {"eps": EPS}
    tokens: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT)
    return RWKV7Config(n_layers=n_layers, **rank, **tokens), state.without(*first)


def vectors(layer: int) -> list[str]:
    """Names of a block's weights that are [d]."""
    return [f"blocks.{layer}.{name}" for name in VECTORS]


def sizes_of(state: LazyState, n_layers: int) -> dict[str, Any]:
    """A config's sizes, from shapes of weights under our names.

    Raises
    ------
    CheckpointError
        Listing those that are missing.
    """
    places = {
        "embed.weight": ("d_vocab", "d_model"),
        "blocks.0.mixer.r_k": (None, "head_dim"),
        "blocks.0.mixer.w1": (None, "decay_rank"),
        "blocks.0.mixer.a1": (None, "rate_rank"),
        "blocks.0.mixer.g1": (None, "gate_rank"),
        "blocks.0.mlp.key.weight": ("d_mlp", None),
    }
    if n_layers > 1:
        places["blocks.1.mixer.v1"] = (None, "value_rank")
    absent = [name for name in places if name not in state]
    if absent:
        names = ", ".join(str(state.place(name)) for name in absent)
        of = f" of {', '.join(state.files)}" if state.files else ""
        raise CheckpointError(f"this RWKV-7{of} lacks {names}, which determine its sizes")
    sizes: dict[str, Any] = {}
    for name, fields in places.items():
        with only_shapes():
            shape = state[name].shape
        if len(shape) != 2:
            raise CheckpointError(f"{state.place(name)} is {list(shape)}; expected two axes")
        sizes |= {field: size for field, size in zip(fields, shape, strict=True) if field is not None}
    return sizes


def from_ours(cfg: RWKV7Config, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`, without a config.

    Raises
    ------
    CheckpointError
        What these files cannot say: another eps, or one embedding for both ends.
    """
    if (cfg.eps, cfg.norm_eps_of_heads, cfg.tie_embeddings) != (EPS, EPS * cfg.K, False):
        raise CheckpointError(
            f"a raw RWKV-7 has eps={EPS}, head_eps={EPS * cfg.K} and tie_embeddings=False built in; got {cfg.eps},"
            f" {cfg.norm_eps_of_heads} and {cfg.tie_embeddings}"
        )
    state = LazyState.of(state_dict)
    shaped = {name: _three_axes for i in range(cfg.n_layers) for name in vectors(i) if name in state}
    return {}, from_ours_weights(state.with_changed(shaped), WEIGHTS, cfg.n_layers)


def _three_axes(vector: Tensor) -> Tensor:
    return vector.view(1, 1, -1)
