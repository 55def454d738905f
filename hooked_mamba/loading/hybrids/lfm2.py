"""LFM2 (arXiv:2511.23404; transformers' `lfm2`): a gated short convolution or attention, then a gated MLP.

Queries and keys have a norm a head before they turn. The MLP's width is two thirds of the one that the config states,
rounded up to a multiple, unless the config says that it is meant as it stands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig, ShortConvConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Table, Whole, write_table
from hooked_mamba.loading.tables import LazyState

WHAT = "this LFM2 config"


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), WHAT)
    config = dict(config)
    config["tie_word_embeddings"] = common.get(config, "tie_embedding", common.get(config, "tie_word_embeddings", True))
    stack = common.stack_fields(config, common.get(config, "norm_eps", 1e-5))
    d, n = stack["d_model"], stack["n_layers"]
    words = config.get("layer_types")
    if not words:
        attends = config.get("full_attn_idxs")
        words = ["attention" if attends is None or i in attends else "conv" for i in range(n)]
    base = common.rope_base(config, WHAT, 1000000.0)
    return HybridConfig(
        **stack,
        branches={
            "mixer": ShortConvConfig(
                d_model=d,
                n_layers=n,
                d_conv=common.get(config, "conv_L_cache", 3),
                bias=bool(common.get(config, "conv_bias", False)),
            ),
            "attn": common.attention(config, d, n, base, qk_norm_eps=stack["eps"], qkv_bias=False, out_bias=False),
            "mlp": MLPConfig(d_model=d, n_layers=n, d_mlp=_neurons(config)),
        },
        layout=tuple(((word,), ("mlp",)) for word in common.layer_words(words, WHAT, {"conv": "mixer"})),
        architecture="lfm2",
        extra=common.kept(config),
    )


def _neurons(config: Mapping[str, Any]) -> int:
    """The width of the MLP."""
    width = common.get(config, "block_ff_dim", common.get(config, "intermediate_size", 12288))
    if not common.get(config, "block_auto_adjust_ff_dim", True):
        return width
    multiple = common.get(config, "block_multiple_of", 256)
    width = int(common.get(config, "block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
    return multiple * -(-width // multiple)


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embed_tokens", "embedding_norm", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    weights: common.Weights = {
        "norm.weight": Whole(f"{theirs}.operator_norm.weight"),
        "norm2.weight": Whole(f"{theirs}.ffn_norm.weight"),
    }
    if "attn" in cfg.layout[i][0]:
        names = {f"{p}_proj.weight": f"{p}_proj.weight" for p in "qkv"} | {"o_proj.weight": "out_proj.weight"}
        names |= {f"{p}_norm_weight": f"{p}_layernorm.weight" for p in "qk"}
        weights |= {f"attn.{ours}": Whole(f"{theirs}.self_attn.{name}") for ours, name in names.items()}
    else:
        layers = {"in_proj": "in_proj", "conv1d": "conv", "out_proj": "out_proj"}
        kinds = ("weight", "bias") if cfg.branches["mixer"].bias else ("weight",)
        weights |= {
            f"mixer.{ours}.{kind}": Whole(f"{theirs}.conv.{layer}.{kind}")
            for ours, layer in layers.items()
            for kind in kinds
        }
    layers = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return weights | {f"mlp.{ours}.weight": Whole(f"{theirs}.feed_forward.{w}.weight") for ours, w in layers.items()}


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    return cfg, common.read_state(state, cfg, table(cfg, common.prefix_of(state, "model.")))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which may merge tensors."""
    conv, attn, mlp = cfg.branches["mixer"], common.attention_of(cfg), cfg.branches["mlp"]
    config = common.stack_config(cfg) | common.attention_fields(attn)
    del config["attention_bias"]
    words = {"mixer": "conv", "attn": "full_attention"}
    config |= {
        "norm_eps": cfg.eps,
        "intermediate_size": mlp.d_mlp,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": conv.d_conv,
        "conv_bias": conv.bias,
        "layer_types": [words[block[0][0]] for block in cfg.layout],
        "architectures": ["Lfm2ForCausalLM"],
    }
    return config, write_table(state, table(cfg, "model."), names)
