"""The small models, one for each recurrence: two layers of equal width, states of equal size."""

from __future__ import annotations

from typing import Any

from hooked_mamba import (
    HookedDeltaNet,
    HookedMamba,
    HookedMamba2,
    HookedMamba3,
    HookedModel,
    HookedRWKV7,
    Mamba2Config,
    MambaConfig,
)
from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.recurrent_config import DeltaNetConfig, Mamba3Config, RWKV7Config

TITLES = {
    "mamba": "Mamba-1",
    "mamba2": "Mamba-2",
    "rwkv7": "RWKV-7",
    "gated_deltanet": "gated DeltaNet",
    "mamba3": "Mamba-3",
}
HEADS = 4
"""Heads of a mixer with heads. RWKV-7, whose keys are as many as its values, has half as many, for as large a state."""
WIDE = {"expand": 1}
"""Mamba-2 and Mamba-3, whose heads share B and C, have half as many channels and twice as many states in each."""


def build_model(
    family: str, d_model: int, n_layers: int, d_state: int, vocab: int, name: str, seed: int
) -> HookedModel:
    """A model with random weights whose layers hold 2 d_model d_state numbers each.

    RWKV-7 and gated DeltaNet have a second half in each block, as they are published: d_model neurons here.

    Raises
    ------
    ValueError
        An unknown family, or sizes that do not divide.
    """
    d, stack = d_model, {"d_model": d_model, "n_layers": n_layers}
    top: dict[str, Any] = {"d_vocab": vocab, "model_name": name}
    if d % (2 * HEADS):
        raise ValueError(f"d_model must be a multiple of {2 * HEADS}, got {d}")
    if family == "mamba":
        return HookedMamba(MambaConfig(**stack, **top, d_state=d_state), seed=seed)
    if family == "mamba2":
        return HookedMamba2(Mamba2Config(**stack, **top, **WIDE, d_state=2 * d_state, head_dim=d // HEADS), seed=seed)
    if family == "rwkv7":
        ranks = dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), d // 4)
        cfg = RWKV7Config(**stack, **top, **ranks, head_dim=2 * d_state, d_mlp=d, tie_embeddings=True)
        return HookedRWKV7(cfg, seed=seed)
    if family == "gated_deltanet":
        mixer = DeltaNetConfig(
            **stack, n_key_heads=HEADS, n_value_heads=HEADS, key_dim=d_state, value_dim=2 * d // HEADS, norm_eps=1e-5
        )
        branches = {"mixer": mixer, "mlp": MLPConfig(**stack, d_mlp=d)}
        layout = ((("mixer",), ("mlp",)),) * n_layers
        return HookedDeltaNet(
            HybridConfig(**stack, **top, branches=branches, layout=layout, architecture="gated_deltanet"), seed=seed
        )
    if family == "mamba3":
        mixer3 = Mamba3Config(**stack, **WIDE, A_act="softplus", d_state=2 * d_state, head_dim=d // HEADS)
        return HookedMamba3(
            HybridConfig(
                **stack, **top, branches={"mixer": mixer3}, layout=((("mixer",),),) * n_layers, architecture="mamba3"
            ),
            seed=seed,
        )
    raise ValueError(f"the family must be one of {', '.join(TITLES)}, got {family!r}")
