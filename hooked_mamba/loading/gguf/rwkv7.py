"""RWKV-7 in GGUF files: the six mixes of a layer in one tensor, projections of low rank transposed.

Layer 0 has no value to mix in; the converter puts copies of other tensors where it would stand, and they are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.loading.gguf import common
from hooked_mamba.loading.gguf.keys import Keys
from hooked_mamba.loading.gguf.sources import Shaped, Slice, Turned
from hooked_mamba.loading.raw_rwkv7 import MIXES
from hooked_mamba.loading.sources import Whole, read_table
from hooked_mamba.loading.tables import LazyState
from hooked_mamba.recurrent_config import RWKV7Config

RANKS = {"decay_rank": "w", "rate_rank": "a", "gate_rank": "g", "value_rank": "v"}
FUSED = "time_mix_lerp_fused.weight"

_BLOCK = {
    "norm": "attn_norm",
    "norm2": "attn_norm_2",
    "mixer.norm": "time_mix_ln",
}
_MATRICES = {
    "mixer.receptance": "time_mix_receptance",
    "mixer.key": "time_mix_key",
    "mixer.value": "time_mix_value",
    "mixer.output": "time_mix_output",
    "mlp.key": "channel_mix_key",
    "mlp.value": "channel_mix_value",
}
_VECTORS = {
    "mixer.k_k": "time_mix_k_k",
    "mixer.k_a": "time_mix_k_a",
    "mixer.w0": "time_mix_w0",
    "mixer.a0": "time_mix_a0",
    "mixer.v0": "time_mix_v0",
    "mlp.x_k": "channel_mix_lerp_k",
}


def to_ours(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[RWKV7Config, LazyState]:
    """Config and weights under our names; ranks are read from the tensors."""
    keys = Keys(values)
    stack = common.stack(keys, state)
    n, K = stack["n_layers"], keys.count("wkv.head_size")
    later = min(1, n - 1)  # only layers behind the first mix in a value
    ranks = {
        field: common.shape_of(state, keys, f"blk.{later if j == 'v' else 0}.time_mix_{j}1.weight", 2)[0]
        for field, j in RANKS.items()
        if j != "v" or n > 1
    }
    cfg = RWKV7Config(
        **(stack | ranks),
        head_dim=K,
        d_mlp=common.neurons(keys, n),
        head_eps=stack["eps"] * K,
    )
    table = common.stack_weights(cfg.tie_embeddings)
    for name, there in {"ln_embed": "token_embd_norm", "ln_final": "output_norm"}.items():
        table |= {f"{name}.{kind}": Whole(f"{there}.{kind}") for kind in ("weight", "bias")}
    for i in range(n):
        table |= common.block(_block(cfg, i, f"blk.{i}"), i)
    return cfg, read_table(state, table, dropped=("blk.0.time_mix_v",) if n else ())


def _block(cfg: RWKV7Config, i: int, there: str) -> common.Weights:
    d = cfg.d_model
    weights: common.Weights = {
        f"{name}.{kind}": Whole(f"{there}.{word}.{kind}")
        for name, word in _BLOCK.items()
        for kind in ("weight", "bias")
    }
    weights |= {f"{name}.weight": Whole(f"{there}.{word}.weight") for name, word in _MATRICES.items()}
    weights |= {name: Shaped(f"{there}.{word}.weight", (d,)) for name, word in _VECTORS.items()}
    weights |= {f"mixer.{mix}": Slice(f"{there}.{FUSED}", row, len(MIXES), d) for row, mix in enumerate(MIXES)}
    weights |= {f"mixer.{j}{m}": Turned(f"{there}.time_mix_{j}{m}.weight") for j in "wavg" for m in (1, 2)}
    weights["mixer.r_k"] = Shaped(f"{there}.time_mix_r_k.weight", (cfg.H, cfg.K))
    return {name: source for name, source in weights.items() if i or name not in ("mixer.v0", "mixer.v1", "mixer.v2")}
