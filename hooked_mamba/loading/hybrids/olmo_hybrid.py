"""OLMo Hybrid (transformers' `olmo_hybrid`): gated DeltaNet behind a norm, or attention before one, then an MLP.

A block of attention has its norms behind attention and MLP; queries and keys have one norm for all heads together.
The eps of the mixer's gated norm is 1e-5 whatever the config says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.loading.hybrids import common, delta
from hooked_mamba.loading.hybrids.gated_deltanet import mixer_weights
from hooked_mamba.loading.sources import Table, Whole, write_table
from hooked_mamba.loading.tables import CheckpointError, LazyState

WHAT = "this OLMo Hybrid config"
GATED_NORM_EPS = 1e-5


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), WHAT)
    delta.refuse(config, WHAT)
    stack = common.stack_fields(config, common.get(config, "rms_norm_eps", 1e-6))
    d, n, heads = stack["d_model"], stack["n_layers"], config["num_attention_heads"]
    key_heads = common.get(config, "linear_num_key_heads", heads)
    key_dim = common.get(config, "linear_key_head_dim", int(0.75 * d / key_heads))
    sizes = {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": common.get(config, "linear_num_value_heads", heads),
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": common.get(config, "linear_value_head_dim", 2 * key_dim),
        "linear_conv_kernel_dim": common.get(config, "linear_conv_kernel_dim", 4),
    }
    doubled = bool(common.get(config, "linear_allow_neg_eigval", True))
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    base = common.rope_base(config, WHAT) if theta else None
    words = delta.layer_words(config, n, WHAT)
    return HybridConfig(
        **stack,
        branches={
            "mixer": delta.delta_net(sizes, d, n, GATED_NORM_EPS, negative_eigenvalues=doubled),
            "attn": common.attention(config, d, n, base, qk_norm_eps=stack["eps"], qk_norm_of_all=True),
            "mlp": MLPConfig(d_model=d, n_layers=n, d_mlp=config["intermediate_size"]),
        },
        layout=tuple(((word,), ("mlp",)) for word in words),
        norm_after=tuple(i for i, word in enumerate(words) if word == "attn"),
        architecture="olmo_hybrid",
        extra=common.kept(config),
    )


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embed_tokens", "norm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    weights = common.mlp_weights("mlp", f"{theirs}.mlp", cfg.branches["mlp"])
    if i in cfg.norm_after:
        attn = common.attention_weights("attn", f"{theirs}.self_attn", cfg.branches["attn"])
        attn |= {f"attn.{p}_norm_weight": Whole(f"{theirs}.self_attn.{p}_norm.weight") for p in "qk"}
        norms = {
            "norm": ("post_attention_layernorm", "feedforward_layer_norm"),  # the second as transformers saves it
            "norm2": ("post_feedforward_layernorm",),
        }
        weights |= attn
    else:
        weights |= mixer_weights(f"{theirs}.linear_attn", cfg.branches["mixer"])
        norms = {  # in files, then in a model object
            "norm": ("attention_layer_norm", "input_layernorm"),
            "norm2": ("feedforward_layer_norm", "post_attention_layernorm"),
        }
    return weights | {
        f"{ours}.weight": tuple(Whole(f"{theirs}.{name}.weight") for name in options) for ours, options in norms.items()
    }


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object.

    Raises
    ------
    CheckpointError
        Another eps of the gated norm.
    """
    mixer, attn = cfg.branches["mixer"], common.attention_of(cfg)
    if mixer.norm_eps != GATED_NORM_EPS:
        raise CheckpointError(f"OLMo Hybrid has norm_eps={GATED_NORM_EPS} built in, got {mixer.norm_eps}")
    words = {"mixer": "linear_attention", "attn": "full_attention"}
    config = common.stack_config(cfg) | common.attention_fields(attn) | delta.delta_fields(mixer)
    config |= {
        "rms_norm_eps": cfg.eps,
        "head_dim": attn.d_head,
        "intermediate_size": cfg.branches["mlp"].d_mlp,
        "linear_allow_neg_eigval": mixer.negative_eigenvalues,
        "layer_types": [words[block[0][0]] for block in cfg.layout],
        "hidden_act": "silu",
        "architectures": ["OlmoHybridForCausalLM"],
    }
    if not attn.rotary_dim:
        config["rope_parameters"] = None
    return config, write_table(state, table(cfg, "model."), names)
