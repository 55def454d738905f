"""Zamba and Zamba2 (arXiv:2405.16712, 2411.15242; transformers' `zamba`, `zamba2`): blocks that share a transformer.

Zamba has one of them and Mamba-1 with heads, whose in_proj has the rows of x and z in turns. Zamba2 has several, taken
in turn, with additions of low rank for each use, and Mamba-2. The first block of a transformer holds its weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import HeadedMambaConfig, Mamba2Config
from hooked_mamba.hybrid_config import SHARED, AttentionConfig, HybridConfig, MLPConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Interleaved, Reshaped, Rows, Table, Whole, write_table
from hooked_mamba.loading.tables import CheckpointError, LazyState, reject

TRANSFORMER = {"zamba": "shared_transf", "zamba2": "shared_transformer"}
"""What a hybrid block calls its shared transformer."""

ZAMBA2_2_7B = [
    *["mamba"],
    *[*["mamba"] * 5, "hybrid"] * 7,
    *[*["mamba"] * 4, "hybrid"],
    *[*["mamba"] * 3, "hybrid"],
    *["mamba"] * 2,
]
"""What a Zamba2 config without a list of layers means."""


def words_of(config: Mapping[str, Any], what: str) -> list[bool]:
    """Which blocks have a shared transformer.

    Raises
    ------
    CheckpointError
        A word that is not one of these families', or another number of words than layers.
    """
    n = config["num_hidden_layers"]
    words = config.get("layers_block_type") or config.get("layer_types")
    if not words and config["model_type"] == "zamba":
        period, offset = common.get(config, "attn_layer_period", 6), common.get(config, "attn_layer_offset", 4)
        words = ["mamba", "mamba", "hybrid"] + ["hybrid" if i % period == offset else "mamba" for i in range(n - 3)]
    words = words or ZAMBA2_2_7B
    known = {"mamba": False, "linear_attention": False, "m": False, "hybrid": True, "g": True}
    if len(words) != n or any(str(word).lower() not in known for word in words):
        raise CheckpointError(f"{what} has num_hidden_layers={n} and names {len(words)}: {', '.join(map(str, words))}")
    return [known[str(word).lower()] for word in words]


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    family = config["model_type"]
    what = f"this {family.capitalize()} config"
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), what)
    reject(config, {"hidden_act": ("gelu",), "hidden_mamba_act": ("silu",)}, what)
    config = {**config, "tie_word_embeddings": common.get(config, "tie_word_embeddings", True)}
    stack = common.stack_fields(config, common.get(config, "rms_norm_eps", 1e-5))
    d, n = stack["d_model"], stack["n_layers"]
    second = family == "zamba2"
    heads, c = config["num_attention_heads"], 2 * d // config["num_attention_heads"]
    adapters = common.get(config, "adapter_rank", 128) if second else None
    attn = AttentionConfig(
        d_model=d,
        n_layers=n,
        n_heads=heads,
        n_key_value_heads=common.get(config, "num_key_value_heads", heads),
        d_head=c,
        scale=(c / 2) ** -0.5,
        rotary_dim=c if second and common.get(config, "use_mem_rope", False) else 0,
        rotary_base=common.rope_base(config, what),
        d_in=2 * d,
        adapter_rank=adapters if common.get(config, "use_shared_attention_adapter", False) else None,
    )
    mlp = MLPConfig(
        d_model=d,
        n_layers=n,
        d_mlp=common.get(config, "intermediate_size", 4 * d),
        activation="gelu",
        bias=second and bool(common.get(config, "add_bias_linear", False)),
        adapter_rank=adapters,
    )
    hybrid = words_of(config, what)
    count = common.get(config, "num_mem_blocks", 1) if second else 1
    use = iter(range(n))
    return HybridConfig(
        **stack,
        branches={"mixer": (_mamba2 if second else _mamba1)(config, stack), "attn": attn, "mlp": mlp},
        layout=tuple(SHARED if h else (("mixer",),) for h in hybrid),
        shared=tuple(next(use) % count if h else None for h in hybrid),
        architecture=family,
        extra=common.kept(config),
    )


def _mamba1(config: Mapping[str, Any], stack: Mapping[str, Any]) -> HeadedMambaConfig:
    rank = common.get(config, "mamba_dt_rank", "auto")
    return HeadedMambaConfig(
        **{name: stack[name] for name in ("d_model", "n_layers", "d_vocab", "eps")},
        d_state=common.get(config, "mamba_d_state", 16),
        d_conv=common.get(config, "mamba_d_conv", 4),
        expand=common.get(config, "mamba_expand", 2),
        dt_rank=math.ceil(stack["d_model"] / 16) if rank == "auto" else rank,
        conv_bias=bool(common.get(config, "mamba_conv_bias", True)),
        use_bias=bool(common.get(config, "mamba_proj_bias", False)),
        n_heads=common.get(config, "n_mamba_heads", 2),
    )


def _mamba2(config: Mapping[str, Any], stack: Mapping[str, Any]) -> Mamba2Config:
    E = int(common.get(config, "mamba_expand", 2) * stack["d_model"])
    return Mamba2Config(
        **{name: stack[name] for name in ("d_model", "n_layers", "d_vocab", "eps")},
        d_inner=E,
        head_dim=E // common.get(config, "n_mamba_heads", 8),
        d_state=common.get(config, "mamba_d_state", 64),
        d_conv=common.get(config, "mamba_d_conv", 4),
        n_groups=common.get(config, "mamba_ngroups", 1),
        chunk_size=common.get(config, "chunk_size", 256),
        use_bias=bool(common.get(config, "add_bias_linear", False)),
        norm_eps=1e-5,
        dt_limit=common.time_step_limit(config),
    )


def hybrid_layers(cfg: HybridConfig) -> Iterator[tuple[int, int, int]]:
    """(block, how many blocks with a shared transformer stand before it, the first block of its transformer)."""
    first: dict[int, int] = {}
    uses = [(i, number) for i, number in enumerate(cfg.shared or ()) if number is not None]
    for j, (i, number) in enumerate(uses):
        yield i, j, first.setdefault(number, i)


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embed_tokens", "final_layernorm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    uses = {block: (j, first) for block, j, first in hybrid_layers(cfg)}
    if i not in uses:
        return _mixer(cfg, theirs)
    j, first = uses[i]
    weights = {"linear.weight": Whole(f"{theirs}.linear.weight"), **_mixer(cfg, f"{theirs}.mamba_decoder")}
    home = f"{theirs.rpartition('.')[0]}.{first}.{TRANSFORMER[cfg.architecture]}"
    return weights | _adapters(cfg, home, j) | (_transformer(cfg, home) if i == first else {})


def _mixer(cfg: HybridConfig, theirs: str) -> common.Weights:
    mixer, there = cfg.branches["mixer"], f"{theirs}.mamba"
    weights: common.Weights = {"norm.weight": Whole(f"{theirs}.input_layernorm.weight")}
    if isinstance(mixer, Mamba2Config):
        return weights | common.mamba2_weights("mixer", there, mixer)
    E, N, G = mixer.E, mixer.d_state, mixer.n_heads
    weights |= common.mamba_weights("mixer", there, mixer.use_bias, mixer.conv_bias)
    weights |= {f"mixer.{name}": Whole(f"{there}.{name}") for name in ("x_proj_weight", "dt_proj_weight")}
    rows = ["in_proj.weight"] + ["in_proj.bias"] * mixer.use_bias
    weights |= {f"mixer.{name}": Interleaved(f"{there}.{name}", 2) for name in rows}
    weights |= {f"mixer.{name}": Reshaped(f"{there}.{name}", (G, E // G), (E,)) for name in ("D", "dt_proj_bias")}
    return weights | {"mixer.A_log": Reshaped(f"{there}.A_log", (G, E // G, N), (E, N))}


def _transformer(cfg: HybridConfig, home: str) -> common.Weights:
    mlp, there = cfg.branches["mlp"], f"{home}.feed_forward"
    weights: common.Weights = {
        "norm_shared.weight": Whole(f"{home}.input_layernorm.weight"),
        "norm2.weight": Whole(f"{home}.pre_ff_layernorm.weight"),
        **common.attention_weights("attn", f"{home}.self_attn", cfg.branches["attn"]),
    }
    if cfg.architecture == "zamba":
        return weights | common.mlp_weights("mlp", there, mlp)
    for kind in ("weight", "bias") if mlp.bias else ("weight",):
        weights[f"mlp.gate_proj.{kind}"] = Rows(f"{there}.gate_up_proj.{kind}", 0, mlp.d_mlp)
        weights[f"mlp.up_proj.{kind}"] = Rows(f"{there}.gate_up_proj.{kind}", mlp.d_mlp, 2 * mlp.d_mlp)
        weights[f"mlp.down_proj.{kind}"] = Whole(f"{there}.down_proj.{kind}")
    return weights


def _adapters(cfg: HybridConfig, home: str, j: int) -> common.Weights:
    """What the j-th use has of its own."""
    weights: common.Weights = {}
    for k, layer in enumerate("ab"):
        if cfg.branches["mlp"].adapter_rank is not None:
            name = f"{home}.feed_forward.gate_up_proj_adapter_list.{j}.{k}.weight"
            weights[f"mlp.adapter.{layer}.weight"] = Whole(name)
        if cfg.branches["attn"].adapter_rank is not None:
            for v in "qkv":
                name = f"{home}.self_attn.linear_{v}_adapter_list.{j}.{k}.weight"
                weights[f"attn.adapters.{v}.{layer}.weight"] = Whole(name)
    return weights


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names; copies of a shared transformer are left out."""
    cfg = config_of(config)
    prefix = common.prefix_of(state, "model.")
    copies = tuple(
        f"{prefix}layers.{i}.{TRANSFORMER[cfg.architecture]}." for i, _, first in hybrid_layers(cfg) if i != first
    )
    return cfg, common.read_state(state, cfg, table(cfg, prefix), dropped=copies)


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which has a copy for every use."""
    mixer, attn, mlp = (cfg.branches[name] for name in ("mixer", "attn", "mlp"))
    second = cfg.architecture == "zamba2"
    config = common.stack_config(cfg)
    config |= {
        "rms_norm_eps": cfg.eps,
        "num_attention_heads": attn.n_heads,
        "num_key_value_heads": attn.n_key_value_heads,
        "intermediate_size": mlp.d_mlp,
        "hidden_act": "gelu",
        "layers_block_type": ["mamba" if number is None else "hybrid" for number in cfg.shared or ()],
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": common.whole_multiple(mixer),
        "architectures": ["Zamba2ForCausalLM" if second else "ZambaForCausalLM"],
    }
    if second:
        config |= {
            "n_mamba_heads": mixer.H,
            "mamba_ngroups": mixer.G,
            "chunk_size": mixer.chunk_size,
            "add_bias_linear": mixer.use_bias,
            "num_mem_blocks": len({number for number in cfg.shared or () if number is not None}),
            "use_shared_attention_adapter": attn.adapter_rank is not None,
            "adapter_rank": mlp.adapter_rank,
            "use_mem_rope": bool(attn.rotary_dim),
            "rope_parameters": {"rope_type": "default", "rope_theta": attn.rotary_base},
        }
        fields = common.mamba2_fields(mixer)
        config |= {name: fields[name] for name in ("time_step_limit",) if name in fields}
    else:
        config |= {
            "n_mamba_heads": mixer.n_heads,
            "mamba_dt_rank": mixer.R,
            "mamba_conv_bias": mixer.conv_bias,
            "mamba_proj_bias": mixer.use_bias,
        }
    written = write_table(state, table(cfg, "model."), names)
    return config, written if names is None else _with_copies(cfg, written, names)


def _with_copies(cfg: HybridConfig, written: LazyState, names: Collection[str]) -> LazyState:
    """The same weights also under the names of every later use."""
    part = TRANSFORMER[cfg.architecture]
    getters = {name: written.getter(name) for name in written}
    for i, _, first in hybrid_layers(cfg):
        here = f"model.layers.{i}.{part}."
        for name in names:
            if i != first and name.startswith(here):
                getters[name] = written.getter(f"model.layers.{first}.{part}.{name.removeprefix(here)}")
    return LazyState(getters)
