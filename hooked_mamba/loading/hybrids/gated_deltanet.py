"""Gated DeltaNet as the package fla writes it (`model_type: gated_deltanet`): the mixer, then a gated MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Joined, Table, Whole, write_table
from hooked_mamba.loading.tables import CheckpointError, LazyState, reject
from hooked_mamba.recurrent_config import DeltaNetConfig

WHAT = "this gated DeltaNet config"

ALLOWED = {"hidden_act": ("swish", "silu"), "attn": (None,), "attnres_block_size": (None,)}

GATES = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value (attention in some layers, fewer value heads than key heads).
    """
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size"), WHAT)
    reject(config, ALLOWED, WHAT)
    stack = common.stack_fields(config, common.get(config, "norm_eps", 1e-6))
    d, n = stack["d_model"], stack["n_layers"]
    heads, K = common.get(config, "num_heads", 6), common.get(config, "head_dim", 256)
    gate = GATES.get(common.get(config, "output_gate_activation", "swish"))
    if gate is None:
        raise CheckpointError(f"{WHAT} has output_gate_activation={config['output_gate_activation']!r}")
    mixer = DeltaNetConfig(
        d_model=d,
        n_layers=n,
        n_key_heads=heads,
        n_value_heads=common.get(config, "num_v_heads", heads),
        key_dim=K,
        value_dim=int(K * common.get(config, "expand_v", 2.0)),
        d_conv=common.get(config, "conv_size", 4) if common.get(config, "use_short_conv", True) else 0,
        conv_bias=bool(common.get(config, "conv_bias", False)),
        norm_eps=stack["eps"],
        gate=gate if common.get(config, "use_gate", True) else "none",  # type: ignore[arg-type]
        negative_eigenvalues=bool(common.get(config, "allow_neg_eigval", False)),
    )
    return HybridConfig(
        **stack,
        branches={"mixer": mixer, "mlp": MLPConfig(d_model=d, n_layers=n, d_mlp=_neurons(config, d))},
        layout=((("mixer",), ("mlp",)),) * n,
        architecture="gated_deltanet",
        extra=common.kept(config),
    )


def _neurons(config: Mapping[str, Any], d: int) -> int:
    """The MLP's width, which fla rounds up to a multiple of 256 where the config gives none."""
    width = config.get("intermediate_size")
    return width or 256 * -(-int(d * common.get(config, "hidden_ratio", 4) * 2 / 3) // 256)


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embeddings", "norm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    mixer: DeltaNetConfig = cfg.branches["mixer"]
    weights: common.Weights = {
        "norm.weight": Whole(f"{theirs}.attn_norm.weight"),
        "norm2.weight": Whole(f"{theirs}.mlp_norm.weight"),
    }
    return (
        weights
        | mixer_weights(f"{theirs}.attn", mixer)
        | common.mlp_weights("mlp", f"{theirs}.mlp", cfg.branches["mlp"])
    )


def mixer_weights(theirs: str, cfg: DeltaNetConfig) -> common.Weights:
    """A mixer whose q, k and v are apart, the convolution's weights too."""
    keys = cfg.n_key_heads * cfg.key_dim
    sizes = (("q", keys), ("k", keys), ("v", cfg.E))
    names = {"a_proj.weight": "a_proj.weight", "b_proj.weight": "b_proj.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
    names |= {"norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight"}
    names |= {"z_proj.weight": "g_proj.weight"} if cfg.gate != "none" else {}
    weights: common.Weights = {f"mixer.{ours}": Whole(f"{theirs}.{name}") for ours, name in names.items()}
    weights["mixer.in_proj.weight"] = Joined(f"{theirs}.{{part}}_proj.weight", sizes)
    if cfg.d_conv:
        for kind in ("weight", "bias") if cfg.conv_bias else ("weight",):
            # transformers 5.24 saves it in three pieces as equal as can be, whatever q, k and v have.
            apart = Joined(f"{theirs}.{{part}}_conv1d.{kind}", sizes, cut_anywhere=True)
            weights[f"mixer.conv1d.{kind}"] = (apart, Whole(f"{theirs}.conv1d.{kind}"))
    return weights


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`."""
    mixer: DeltaNetConfig = cfg.branches["mixer"]
    if mixer.norm_eps != cfg.eps:
        raise CheckpointError(f"fla has one eps for all norms: expected norm_eps={cfg.eps}, got {mixer.norm_eps}")
    config = common.stack_config(cfg) | {
        "norm_eps": cfg.eps,
        "num_heads": mixer.n_key_heads,
        "num_v_heads": mixer.n_value_heads,
        "head_dim": mixer.key_dim,
        "expand_v": mixer.value_dim / mixer.key_dim,
        "use_short_conv": mixer.d_conv > 0,
        "conv_size": mixer.d_conv or 4,
        "conv_bias": mixer.conv_bias,
        "use_gate": mixer.gate != "none",
        "output_gate_activation": "sigmoid" if mixer.gate == "sigmoid" else "swish",
        "allow_neg_eigval": mixer.negative_eigenvalues,
        "intermediate_size": cfg.branches["mlp"].d_mlp,
        "hidden_act": "swish",
        "architectures": ["GatedDeltaNetForCausalLM"],
    }
    return config, write_table(state, table(cfg, "model."), names)
