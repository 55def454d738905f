"""Nemotron-H and Nemotron 3 (arXiv:2504.03624; transformers' `nemotron_h`): one sublayer a block.

MLPs and experts are ungated, with relu^2; experts may work in a latent width, beside a shared one on the stream.
The step size is clamped by `time_step_limit`, as in the published code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config
from hooked_mamba.hybrid_config import Activation, HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.loading.hybrids import common
from hooked_mamba.loading.sources import Table, Whole, write_table
from hooked_mamba.loading.tables import CheckpointError, LazyState, reject

WHAT = "this Nemotron-H config"
ACTIVATIONS: dict[str, Activation] = {"relu2": "relu2", "silu": "silu", "relu": "relu", "gelu": "gelu"}
LETTERS = {"mixer": "M", "attn": "*", "mlp": "-", "moe": "E"}
OWN_WORDS = ("mamba", "attention", "mlp", "moe")


def words_of(config: Mapping[str, Any]) -> list[str]:
    """The branch of each block, from a list of words or the letters of `hybrid_override_pattern`.

    Raises
    ------
    CheckpointError
        Neither is there, a word is unknown, or their number is not that of the layers.
    """
    words = config.get("layers_block_type") or config.get("layer_types") or config.get("hybrid_override_pattern")
    if not words:
        raise CheckpointError(
            f"{WHAT} lacks layers_block_type and hybrid_override_pattern: nothing says what stands where"
        )
    found = common.layer_words(words, WHAT)
    n = config.get("num_hidden_layers")
    if n is not None and n != len(found):
        raise CheckpointError(f"{WHAT} has num_hidden_layers={n} and names {len(found)} layers")
    return found


def config_of(config: Mapping[str, Any]) -> HybridConfig:
    """Our config.

    Raises
    ------
    CheckpointError
        A missing field or an unsupported value.
    """
    words = words_of(config)
    attends = ("num_attention_heads",) if "attn" in words else ()
    common.need(config, ("hidden_size", "vocab_size", *attends), WHAT)
    reject(config, {"mamba_hidden_act": ("silu",), "mlp_hidden_act": tuple(ACTIVATIONS)}, WHAT)
    eps = common.get(config, "layer_norm_epsilon", common.get(config, "rms_norm_eps", 1e-5))
    stack = common.stack_fields({**config, "num_hidden_layers": len(words)}, eps)
    d, n = stack["d_model"], stack["n_layers"]
    heads, head_dim = common.get(config, "mamba_num_heads", 128), common.get(config, "mamba_head_dim", 64)
    activation = ACTIVATIONS[common.get(config, "mlp_hidden_act", "relu2")]
    mixer = Mamba2Config(
        **{name: stack[name] for name in ("d_model", "n_layers", "d_vocab", "eps")},
        d_inner=heads * head_dim,
        head_dim=head_dim,
        d_state=common.get(config, "ssm_state_size", 128),
        d_conv=common.get(config, "conv_kernel", 4),
        n_groups=common.get(config, "n_groups", 8),
        chunk_size=common.get(config, "chunk_size", 128),
        conv_bias=bool(common.get(config, "use_conv_bias", True)),
        use_bias=bool(common.get(config, "use_bias", False)),
        dt_limit=common.time_step_limit(config),
    )
    bias = bool(common.get(config, "mlp_bias", False))
    branches: dict[str, Any] = {"mixer": mixer}
    if "attn" in words:
        branches["attn"] = common.attention(config, d, n, None)
    d_mlp = common.get(config, "intermediate_size", 21504)
    if "moe" in words:
        branches["moe"] = MoEConfig(
            d_model=d,
            n_layers=n,
            n_experts=common.get(config, "n_routed_experts", 8),
            top_k=common.get(config, "num_experts_per_tok", 2),
            d_mlp=common.get(config, "moe_intermediate_size", 7688),
            activation=activation,
            gated=False,
            scoring="sigmoid",
            normalize=bool(common.get(config, "norm_topk_prob", True)),
            routed_scale=float(common.get(config, "routed_scaling_factor", 1.0)),
            correction_bias=True,
            n_groups=common.get(config, "n_group", 1),
            top_k_groups=common.get(config, "topk_group", 1),
            d_latent=config.get("moe_latent_size"),
        )
        shared = common.get(config, "moe_shared_expert_intermediate_size", 7688)
        branches["shared"] = MLPConfig(
            d_model=d, n_layers=n, d_mlp=shared, activation=activation, gated=False, bias=bias
        )
    if "mlp" in words:
        branches["mlp"] = MLPConfig(d_model=d, n_layers=n, d_mlp=d_mlp, activation=activation, gated=False, bias=bias)
    return HybridConfig(
        **stack,
        residual_in_fp32=False,
        branches={name: branch for name, branch in branches.items() if name in words or name == "shared"},
        layout=tuple((("moe", "mlp=shared") if word == "moe" else (word,),) for word in words),
        architecture="nemotron_h",
        extra=common.kept(config),
    )


def table(cfg: HybridConfig, prefix: str) -> Table:
    """Where each weight stands."""
    return common.table_of(cfg, prefix, "embeddings", "norm_f", _block)


def _block(cfg: HybridConfig, i: int, theirs: str) -> common.Weights:
    weights: common.Weights = {"norm.weight": Whole(f"{theirs}.norm.weight")}
    there, names = f"{theirs}.mixer", cfg.layout[i][0]
    if "mixer" in names:
        weights |= common.mamba2_weights("mixer", there, cfg.branches["mixer"])
    if "attn" in names:
        weights |= common.attention_weights("attn", there, cfg.branches["attn"])
    if "mlp" in names:
        weights |= common.mlp_weights("mlp", there, cfg.branches["mlp"])
    if "moe" in names:
        weights |= {
            "moe.router.weight": Whole(f"{there}.gate.weight"),
            "moe.correction_bias": Whole(f"{there}.gate.e_score_correction_bias"),
            **common.expert_weights("moe", f"{there}.experts", cfg.branches["moe"]),
            **common.mlp_weights("mlp", f"{there}.shared_experts", cfg.branches["shared"]),
        }
        if cfg.branches["moe"].d_latent is not None:
            weights["moe.latent_in.weight"] = Whole(f"{there}.fc1_latent_proj.weight")
            weights["moe.latent_out.weight"] = Whole(f"{there}.fc2_latent_proj.weight")
    return weights


def _prefix(names: Collection[str]) -> str:
    """Files say backbone, model objects of release 5 say model."""
    return "model." if any(name.startswith("model.") for name in names) else "backbone."


def to_ours(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[HybridConfig, LazyState]:
    """Config and weights of a file under our names; the heads for several tokens at once (`mtp.*`) are left out."""
    cfg = config_of(config)
    bare = not any(name.startswith(("model.", "backbone.")) for name in state)
    return cfg, common.read_state(state, cfg, table(cfg, "" if bare else _prefix(state)), dropped=("mtp.",))


def from_ours(
    cfg: HybridConfig, state: Mapping[str, Tensor], names: Collection[str] | None = None
) -> tuple[dict[str, Any], LazyState]:
    """The inverse of :func:`to_ours`; `names` are those of a model object, which may merge tensors."""
    config = common.stack_config(cfg)
    mixer, attn, mlp, moe, shared = (cfg.branches.get(name) for name in ("mixer", "attn", "mlp", "moe", "shared"))
    words = dict(zip(LETTERS, OWN_WORDS, strict=True))
    config |= {
        "layers_block_type": [words[block[0][0]] for block in cfg.layout],
        "layer_norm_epsilon": cfg.eps,
        "architectures": ["NemotronHForCausalLM"],
    }
    if attn is not None:
        config |= common.attention_fields(attn) | {"head_dim": attn.d_head}
    if mixer is not None:
        config |= {
            "mamba_num_heads": mixer.H,
            "mamba_head_dim": mixer.P,
            "ssm_state_size": mixer.d_state,
            "conv_kernel": mixer.d_conv,
            "n_groups": mixer.G,
            "chunk_size": mixer.chunk_size,
            "use_conv_bias": mixer.conv_bias,
            "use_bias": mixer.use_bias,
        }
        fields = common.mamba2_fields(mixer)
        config |= {name: fields[name] for name in ("time_step_limit",) if name in fields}
    one = mlp if mlp is not None else shared
    if one is not None:
        config |= {"mlp_hidden_act": one.activation, "mlp_bias": one.bias}
    if mlp is not None:
        config["intermediate_size"] = mlp.d_mlp
    if moe is not None and shared is not None:
        config |= {
            "n_routed_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_mlp,
            "moe_shared_expert_intermediate_size": shared.d_mlp,
            "moe_latent_size": moe.d_latent,
            "norm_topk_prob": moe.normalize,
            "routed_scaling_factor": moe.routed_scale,
            "n_group": moe.n_groups,
            "topk_group": moe.top_k_groups,
        }
    return config, write_table(state, table(cfg, _prefix(names or ())), names)
