"""Mamba-3 as mamba_ssm (`ssm_cfg.layer = "Mamba3"`, `is_mimo` or not) and fla (`mamba3`, single inputs) write it.

The weights have the same names in both. What they do not say is how A' becomes a rate of decay: release 2.3.2 of
mamba_ssm and fla 0.6 take softplus, mamba_ssm's main branch since June 2026 takes 1 + x above 0 and 1 / (1 - x) below.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.raw_fields import NORM_EPS, read_ssm_cfg, read_top, write_top
from hooked_mamba.loading.sources import Reshaped, Table, Whole, write_table
from hooked_mamba.loading.tables import CheckpointError, Field, LazyState, reject
from hooked_mamba.recurrent_config import Mamba3Config, Mamba3MIMOConfig

FIELDS = (
    Field("d_state", "d_state", 128),
    Field("expand", "expand", 2),
    Field("head_dim", "headdim", 64),
    Field("n_groups", "ngroups", 1),
    Field("rope_fraction", "rope_fraction", 0.5),
    Field("A_floor", "A_floor", 1e-4),
    Field("norm_of_heads", "is_outproj_norm", False),
)
"""Ours and mamba_ssm's."""

FLA = {
    "d_state": ("state_size", 128),
    "expand": ("expand", 2),
    "head_dim": ("head_dim", 64),
    "n_groups": ("n_groups", 1),
    "rope_fraction": ("rope_fraction", 0.5),
    "A_floor": ("A_floor", 1e-4),
    "norm_of_heads": ("is_outproj_norm", False),
    "use_bias": ("use_bias", False),
}
"""Ours -> fla's, and its default."""

UNUSED = {"dt_min", "dt_max", "dt_init_floor", "chunk_size", "dropout", "fuse_pregate_headwise_norm"}
RANK = 4
"""mimo_rank where mamba_ssm's config names none."""


def raw_config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config of one of mamba_ssm.

    Raises
    ------
    CheckpointError
        A missing or unknown field, or no `A_act`.
    """
    what = "this raw Mamba-3 config"
    top = read_top(config, what)
    act = (config.get("ssm_cfg") or {}).get("A_act")
    if act not in ("softplus", "heavy_tail"):
        raise CheckpointError(
            f"{what} has A_act={act!r}: two variants of Mamba-3 have been published under the same names of weights,"
            ' and no file says which it was trained with. Write "A_act": "softplus" (mamba_ssm 2.3.2) or "heavy_tail"'
            " (its main branch since June 2026: 1 + x above 0, 1 / (1 - x) below) into ssm_cfg of config.json"
        )
    allowed = {"is_mimo": (False, True), "A_act": ("softplus", "heavy_tail")}
    fields = read_ssm_cfg(config, FIELDS, allowed, UNUSED | {"mimo_rank"}, what)
    if config["ssm_cfg"].get("is_mimo"):
        fields["mimo_rank"] = config["ssm_cfg"].get("mimo_rank", RANK)
    return _config(top, {**fields, "A_act": act})


def _config(stack: Mapping[str, Any], fields: Mapping[str, Any]) -> HybridConfig:
    d, n = stack["d_model"], stack["n_layers"]
    kind = Mamba3MIMOConfig if "mimo_rank" in fields else Mamba3Config
    return HybridConfig(
        **stack,
        branches={"mixer": kind(d_model=d, n_layers=n, **fields)},
        layout=((("mixer",),),) * n,
        architecture="mamba3",
    )


def fla_config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config of one of fla, whose code takes softplus.

    Raises
    ------
    CheckpointError
        A missing field, or several inputs and outputs (MIMO).
    """
    what = "this Mamba-3 config"
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size"), what)
    reject(config, {"is_mimo": (False,), "hidden_act": ("silu", "swish")}, what)
    stack = common.stack_fields(config, common.get(config, "norm_eps", 1e-5))
    stack["residual_in_fp32"] = bool(common.get(config, "residual_in_fp32", True))
    fields = {ours: common.get(config, theirs, default) for ours, (theirs, default) in FLA.items()}
    return _config(stack, {**fields, "A_act": "softplus", "norm_eps": stack["eps"]})


def table(cfg: HybridConfig, embed: str) -> Table:
    """Where each weight stands."""
    found = dict(common.stack_weights("backbone.", embed, "norm_f", cfg.tie_embeddings))
    for i in range(cfg.n_layers):
        theirs = f"backbone.layers.{i}"
        found[f"blocks.{i}.norm.weight"] = Whole(f"{theirs}.norm.weight")
        mixer = mixer_weights(f"{theirs}.mixer", cfg.branches["mixer"])
        found |= {f"blocks.{i}.{ours}": source for ours, source in mixer.items()}
    return found


def mixer_weights(theirs: str, cfg: Mamba3Config) -> common.Weights:
    """A mixer; with a single input, biases of B and C have an axis of rank 1."""
    several = isinstance(cfg, Mamba3MIMOConfig)
    names = ["in_proj.weight", "dt_bias", "D", "out_proj.weight"]
    names += ["in_proj.bias", "out_proj.bias"] * cfg.use_bias + ["norm.weight"] * cfg.norm_of_heads
    names += [f"{part}_bias" for part in "BC"] * several + ["mimo_x", "mimo_z", "mimo_o"] * several
    weights: common.Weights = {f"mixer.{name}": Whole(f"{theirs}.{name}") for name in names}
    for part in "BC":
        weights[f"mixer.{part}_norm_weight"] = Whole(f"{theirs}.{part}_norm.weight")
        if not several:
            shapes = (cfg.H, 1, cfg.d_state), (cfg.H, cfg.d_state)
            weights[f"mixer.{part}_bias"] = Reshaped(f"{theirs}.{part}_bias", *shapes)
    return weights


def raw_to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of mamba_ssm under our names."""
    cfg = raw_config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, "embedding"))


def raw_from_ours(cfg: HybridConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], LazyState]:
    """The inverse; `A_act` is written into ssm_cfg, where mamba_ssm does not look for it.

    Raises
    ------
    CheckpointError
        What mamba_ssm cannot express: another eps, biases of the projections.
    """
    mixer: Mamba3Config = cfg.branches["mixer"]
    if mixer.norm_eps != NORM_EPS or mixer.use_bias:
        raise CheckpointError(
            f"mamba_ssm has norm_eps={NORM_EPS} and no biases of projections in Mamba-3; got {mixer.norm_eps} and"
            f" use_bias={mixer.use_bias}"
        )
    ssm_cfg = {row.theirs: getattr(mixer, row.ours) for row in FIELDS}
    if isinstance(mixer, Mamba3MIMOConfig):
        ssm_cfg |= {"is_mimo": True, "mimo_rank": mixer.mimo_rank}
    config = write_top(cfg, {"layer": "Mamba3", "A_act": mixer.A_act, **ssm_cfg})  # type: ignore[arg-type]
    written = dict(write_table(state, table(cfg, "embedding")).items())
    if cfg.tie_embeddings:
        written["lm_head.weight"] = written["backbone.embedding.weight"]
    return config, LazyState.of(written)


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of fla under our names."""
    cfg = fla_config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, "embeddings"))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`.

    Raises
    ------
    CheckpointError
        What fla cannot express: the other rate of decay, an eps of its own for the mixer's norms.
    """
    mixer: Mamba3Config = cfg.branches["mixer"]
    if isinstance(mixer, Mamba3MIMOConfig):
        raise CheckpointError("fla's files hold single inputs and outputs; got MIMO: save with format='raw' instead")
    if mixer.A_act != "softplus" or mixer.norm_eps != cfg.eps:
        raise CheckpointError(
            f"fla takes softplus and one eps for all norms; got A_act={mixer.A_act!r}, norm_eps={mixer.norm_eps} and"
            f" eps={cfg.eps}: save with format='raw' instead"
        )
    config = common.stack_config(cfg) | {theirs: getattr(mixer, ours) for ours, (theirs, _) in FLA.items()}
    config |= {
        "norm_eps": cfg.eps,
        "residual_in_fp32": cfg.residual_in_fp32,
        "is_mimo": False,
        "hidden_act": "silu",
        "architectures": ["Mamba3ForCausalLM"],
    }
    return config, write_table(state, table(cfg, "embeddings"), names)
