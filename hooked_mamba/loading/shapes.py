"""Which weights a config asks for, and of which shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.loading.tables import CheckpointError

__all__ = ["check_shapes", "weight_shapes"]

Shape = tuple[int, ...]


def weight_shapes(cfg: MambaConfig | Mamba2Config) -> dict[str, Shape]:
    """Every weight of a model of `cfg`, by our name, with its shape."""
    d, E, V = cfg.d_model, cfg.E, cfg.d_vocab
    block: dict[str, Shape] = {
        "norm.weight": (d,),
        "mixer.in_proj.weight": (in_proj_rows(cfg), d),
        "mixer.conv1d.weight": (cfg.conv_dim, 1, cfg.d_conv),
        "mixer.out_proj.weight": (d, E),
    }
    if cfg.use_bias:
        block |= {"mixer.in_proj.bias": (in_proj_rows(cfg),), "mixer.out_proj.bias": (d,)}
    if cfg.conv_bias:
        block["mixer.conv1d.bias"] = (cfg.conv_dim,)
    if isinstance(cfg, Mamba2Config):
        block |= {f"mixer.{name}": (cfg.H,) for name in ("A_log", "D", "dt_bias")} | {"mixer.norm.weight": (E,)}
    else:
        block |= {
            "mixer.x_proj.weight": (cfg.R + 2 * cfg.d_state, E),
            "mixer.dt_proj.weight": (E, cfg.R),
            "mixer.dt_proj.bias": (E,),
            "mixer.A_log": (E, cfg.d_state),
            "mixer.D": (E,),
        }
    table: dict[str, Shape] = {"embed.weight": (V, d), "ln_final.weight": (d,)}
    if not cfg.tie_embeddings:
        table["unembed.weight"] = (V, d)
    return table | {f"blocks.{i}.{n}": shape for i in range(cfg.n_layers) for n, shape in block.items()}


def in_proj_rows(cfg: MambaConfig | Mamba2Config) -> int:
    """Rows of the fused projection: x and z in Mamba-1; z, x, B, C and dt in Mamba-2."""
    return cfg.E + cfg.conv_dim + cfg.H if isinstance(cfg, Mamba2Config) else 2 * cfg.E


def check_shapes(cfg: MambaConfig | Mamba2Config, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of `cfg`.

    Raises
    ------
    CheckpointError
        Listing every missing, unexpected and misshaped weight.
    """
    expected = weight_shapes(cfg)
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state_dict]
    for name in state_dict:
        got = tuple(state_dict[name].shape)
        if name not in expected:
            faults.append(f"unexpected: {name} {got}")
        elif got != expected[name]:
            faults.append(f"shape: {name} got {got}, expected {expected[name]}")
    if faults:
        raise CheckpointError(f"the weights do not fit the config, {len(faults)} faults:\n  " + "\n  ".join(faults))
