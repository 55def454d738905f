"""Qwen3-Next and Qwen3.5, dense and with experts (transformers' qwen3_next, qwen3_5, qwen3_5_moe).

Gated DeltaNet in three of four layers, gated attention in the fourth, then an MLP or experts. Norms of the stream, of
queries and of keys multiply with 1 + weight; ours hold the sum. Qwen3-Next stores q, k, v, z (and b, a) of one key
head together. Files of Qwen3.5 may hold a vision tower and a head for several tokens, which are left out; positions
are those of text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.hybrid_config import HybridConfig, MLPConfig
from hooked_mamba.loading.hybrids import common, delta
from hooked_mamba.loading.sources import OnePlus, Runs, Table, Whole, write_table
from hooked_mamba.loading.tables import LazyState
from hooked_mamba.recurrent_config import DeltaNetConfig

CLASSES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
"""model_type of the language model alone -> its class."""

DROPPED = ("model.visual.", "mtp.", "model.mtp.")


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    text = config.get("text_config")
    if text:
        config = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **text}
    architecture = config.get("model_type", "qwen3_next")
    what = f"this {architecture} config"
    common.need(config, ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"), what)
    delta.refuse(config, what)
    stack = common.stack_fields(config, common.get(config, "rms_norm_eps", 1e-6))
    d, n, eps = stack["d_model"], stack["n_layers"], stack["eps"]
    branches: dict[str, Any] = {
        "mixer": delta.delta_net(config, d, n, eps),
        "attn": delta.gated_attention(config, d, n, eps, what),
    }
    routed = _routed(config, n)
    if any(routed):
        branches |= delta.experts(config, d, n)
    if not all(routed):
        branches["mlp"] = MLPConfig(d_model=d, n_layers=n, d_mlp=config["intermediate_size"])
    words = delta.layer_words(config, n, what)
    second = {True: ("moe", "mlp=shared"), False: ("mlp",)}
    return HybridConfig(
        **stack,
        branches=branches,
        layout=tuple(((word,), second[has]) for word, has in zip(words, routed, strict=True)),
        architecture=architecture,
        extra=common.kept(config),
    )


def _routed(config: Mapping[str, Any], n: int) -> list[bool]:
    """Which layers have experts."""
    if not config.get("num_experts"):
        return [False] * n
    dense, step = config.get("mlp_only_layers") or [], common.get(config, "decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(n)]


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    found = dict(common.table_of(cfg, prefix, "embed_tokens", "norm", _block))
    found["ln_final.weight"] = OnePlus(f"{prefix}norm.weight")
    return found


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    weights: common.Weights = {
        "norm.weight": OnePlus(f"{theirs}.input_layernorm.weight"),
        "norm2.weight": OnePlus(f"{theirs}.post_attention_layernorm.weight"),
    }
    first, second = cfg.layout[i]
    weights |= _attention(cfg, f"{theirs}.self_attn") if "attn" in first else _mixer(cfg, f"{theirs}.linear_attn")
    if "moe" in second:
        return weights | delta.experts_weights(cfg, f"{theirs}.mlp")
    return weights | common.mlp_weights("mlp", f"{theirs}.mlp", cfg.branches["mlp"])


def _attention(cfg: HybridConfig, theirs: str) -> common.Weights:
    """q_proj holds each head's query, then its gate."""
    attn = cfg.branches["attn"]
    Q, c = attn.n_heads, attn.d_head
    weights = common.attention_weights("attn", theirs, attn)
    for kind in ("weight", "bias") if attn.qkv_bias else ("weight",):
        weights[f"attn.q_proj.{kind}"] = Runs(f"{theirs}.q_proj.{kind}", delta.runs(Q, 2 * c, 0, c))
        weights[f"attn.gate_proj.{kind}"] = Runs(f"{theirs}.q_proj.{kind}", delta.runs(Q, 2 * c, c, c))
    return weights | {f"attn.{p}_norm_weight": OnePlus(f"{theirs}.{p}_norm.weight") for p in "qk"}


def _mixer(cfg: HybridConfig, theirs: str) -> common.Weights:
    mixer: DeltaNetConfig = cfg.branches["mixer"]
    names = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    weights: common.Weights = {f"mixer.{name}": Whole(f"{theirs}.{name}") for name in names}
    if cfg.architecture != "qwen3_next":
        apart = {"in_proj": "in_proj_qkv", "z_proj": "in_proj_z", "a_proj": "in_proj_a", "b_proj": "in_proj_b"}
        return weights | {f"mixer.{ours}.weight": Whole(f"{theirs}.{name}.weight") for ours, name in apart.items()}
    G, K, V = mixer.n_key_heads, mixer.key_dim, mixer.value_dim
    r = mixer.n_value_heads // G
    width, fused, narrow = 2 * K + 2 * r * V, f"{theirs}.in_proj_qkvz.weight", f"{theirs}.in_proj_ba.weight"
    q, k = delta.runs(G, width, 0, K), delta.runs(G, width, K, K)
    v, z = delta.runs(G, width, 2 * K, r * V), delta.runs(G, width, 2 * K + r * V, r * V)
    return weights | {
        "mixer.in_proj.weight": Runs(fused, (*q, *k, *v)),
        "mixer.z_proj.weight": Runs(fused, z),
        "mixer.b_proj.weight": Runs(narrow, delta.runs(G, 2 * r, 0, r)),
        "mixer.a_proj.weight": Runs(narrow, delta.runs(G, 2 * r, r, r)),
    }


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names."""
    cfg = config_of(config)
    inner = "model.language_model."
    prefix = inner if any(name.startswith(inner) for name in state) else common.prefix_of(state, "model.")
    return cfg, common.read_state(state, cfg, table(cfg, prefix), DROPPED)


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`, of the language model alone; `names` are those of a model object."""
    mixer, attn = delta.delta_net_of(cfg), common.attention_of(cfg)
    architecture = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}.get(
        cfg.architecture, cfg.architecture
    )
    config = common.stack_config(cfg) | common.attention_fields(attn) | delta.delta_fields(mixer)
    words = {"mixer": "linear_attention", "attn": "full_attention"}
    config |= {
        "model_type": architecture,
        "architectures": [CLASSES[architecture]],
        "rms_norm_eps": cfg.eps,
        "head_dim": attn.d_head,
        "hidden_act": "silu",
        "layer_types": [words[block[0][0]] for block in cfg.layout],
    }
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": attn.rotary_base,
        "partial_rotary_factor": attn.rotary_dim / attn.d_head,
    }
    if "mlp" in cfg.branches:
        config["intermediate_size"] = cfg.branches["mlp"].d_mlp
    if "moe" in cfg.branches:
        moe = cfg.branches["moe"]
        config |= {
            "num_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_mlp,
            "shared_expert_intermediate_size": cfg.branches["shared"].d_mlp,
            "norm_topk_prob": moe.normalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, block in enumerate(cfg.layout) if "moe" not in block[1]],
        }
    elif architecture == "qwen3_next":
        config["num_experts"] = 0
    return config, write_table(state, table(cfg, "model."), names)
