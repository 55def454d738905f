"""What the families of hybrids have in common: words of layers, tables of weights by branch, fields of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.loading.hf_fields import limit_of
from hooked_mamba.loading.sources import Rows, Source, Stacked, Table, Whole, read_table
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.tying import drop_tied

LAYER_WORDS = {
    "mamba": "mixer",
    "linear_attention": "mixer",
    "mamba2": "mixer",
    "m": "mixer",
    "attention": "attn",
    "full_attention": "attn",
    "*": "attn",
    "mlp": "mlp",
    "-": "mlp",
    "moe": "moe",
    "e": "moe",
}
"""Every spelling of a kind of layer in releases 4.5x and 5.x of transformers and in published files -> the branch."""

Weights = dict[str, Source | tuple[Source, ...]]


def layer_words(words: Sequence[str], what: str, extra: Mapping[str, str] | None = None) -> list[str]:
    """Branches of a list (or string) of layer words.

    Raises
    ------
    CheckpointError
        A word that no release uses.
    """
    known = LAYER_WORDS | dict(extra or {})
    found = []
    for i, word in enumerate(words):
        branch = known.get(str(word).lower())
        if branch is None:
            raise CheckpointError(f"{what} calls layer {i} {word!r}; expected one of {', '.join(known)}")
        found.append(branch)
    return found


def need(config: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    """Refuse a config without the fields that have no default.

    Raises
    ------
    CheckpointError
        Listing all that are absent.
    """
    absent = [name for name in names if config.get(name) is None]
    if absent:
        raise CheckpointError(f"{what} lacks {', '.join(absent)}; it has {', '.join(sorted(config)) or 'nothing'}")


def get(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field, or the format's default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def token(value: Any) -> int | None:
    """One id where a config may give a list of them: the first."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def stack_fields(config: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """The fields of the stack itself."""
    return {
        "d_model": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "d_vocab": config["vocab_size"],
        "eps": eps,
        "tie_embeddings": bool(get(config, "tie_word_embeddings", False)),
        "bos_token_id": token(config.get("bos_token_id")),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def rope_base(config: Mapping[str, Any], what: str, default: float = 10000.0) -> float:
    """The base of rotary positions, from either spelling.

    Raises
    ------
    CheckpointError
        A kind of scaled positions that is not computed here.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in (None, "default"):
        raise CheckpointError(f"{what} has positions of type {kind!r}, which is not supported; expected 'default'")
    return float(parameters.get("rope_theta") or get(config, "rope_theta", default))


def attention(config: Mapping[str, Any], d_model: int, n_layers: int, rotary: float | None, **more: Any) -> Any:
    """What shapes attention; `rotary` is the base of positions on the whole head, None for none."""
    heads = config["num_attention_heads"]
    d_head = get(config, "head_dim", None) or d_model // heads
    fields = {
        "n_heads": heads,
        "n_key_value_heads": get(config, "num_key_value_heads", heads),
        "d_head": d_head,
        "qkv_bias": bool(get(config, "attention_bias", False)),
        "out_bias": bool(get(config, "attention_bias", False)),
    }
    if rotary is not None:
        fields |= {"rotary_dim": d_head, "rotary_base": rotary}
    return AttentionConfig(d_model=d_model, n_layers=n_layers, **(fields | more))


def mamba2(config: Mapping[str, Any], stack: Mapping[str, Any], d_inner: int, **more: Any) -> Mamba2Config:
    """What shapes a Mamba-2 mixer whose fields begin with mamba_ (Bamba, Granite, Falcon-H1)."""
    head_dim = get(config, "mamba_d_head", "auto")
    fields = {
        "d_inner": d_inner,
        "d_state": get(config, "mamba_d_state", 256),
        "d_conv": get(config, "mamba_d_conv", 4),
        "head_dim": d_inner // get(config, "mamba_n_heads", 128) if head_dim == "auto" else head_dim,
        "n_groups": get(config, "mamba_n_groups", 1),
        "chunk_size": get(config, "mamba_chunk_size", 256),
        "conv_bias": bool(get(config, "mamba_conv_bias", True)),
        "use_bias": bool(get(config, "mamba_proj_bias", False)),
        "dt_limit": time_step_limit(config),
    }
    named = ("d_model", "n_layers", "d_vocab", "eps")
    return Mamba2Config(**{name: stack[name] for name in named}, **(fields | more))


def time_step_limit(config: Mapping[str, Any]) -> tuple[float, float]:
    """The clamp of the step size."""
    return limit_of(config.get("time_step_limit"))


# Weights -----------------------------------------------------------------------------------------------------------


def mamba_weights(ours: str, theirs: str, bias: bool, conv_bias: bool) -> Weights:
    """What both Mamba mixers have."""
    names = ["in_proj.weight", "conv1d.weight", "A_log", "D", "out_proj.weight"]
    names += ["conv1d.bias"] * conv_bias + ["in_proj.bias", "out_proj.bias"] * bias
    return {f"{ours}.{name}": Whole(f"{theirs}.{name}") for name in names}


def mamba2_weights(ours: str, theirs: str, cfg: Mamba2Config) -> Weights:
    """A Mamba-2 mixer."""
    table = mamba_weights(ours, theirs, False, cfg.conv_bias)
    names = ["in_proj.bias"] * cfg.use_bias + ["out_proj.bias"] * cfg.has_out_bias
    names += ["dt_bias", *(["norm.weight"] if cfg.gated_norm != "none" else [])]
    return table | {f"{ours}.{name}": Whole(f"{theirs}.{name}") for name in names}


def attention_weights(ours: str, theirs: str, cfg: AttentionConfig) -> Weights:
    """Four projections."""
    names = [f"{p}_proj.weight" for p in "qkvo"]
    names += [f"{p}_proj.bias" for p in "qkv" if cfg.qkv_bias] + ["o_proj.bias"] * cfg.out_bias
    return {f"{ours}.{name}": Whole(f"{theirs}.{name}") for name in names}


def mlp_weights(ours: str, theirs: str, cfg: MLPConfig) -> Weights:
    """An MLP of separate matrices."""
    layers = ("gate_proj", "up_proj", "down_proj") if cfg.gated else ("up_proj", "down_proj")
    kinds = ("weight", "bias") if cfg.bias else ("weight",)
    return {f"{ours}.{layer}.{kind}": Whole(f"{theirs}.{layer}.{kind}") for layer in layers for kind in kinds}


def expert_weights(ours: str, theirs: str, cfg: MoEConfig) -> Weights:
    """Experts, single as on disk, merged as in a model object, or merged with gate and up apart (MLX)."""
    F, X = cfg.d_mlp, cfg.n_experts
    table: Weights = {}
    if cfg.gated:
        merged = f"{theirs}.gate_up_proj"
        for layer, start in (("gate_proj", 0), ("up_proj", F)):
            single, rows = Stacked(f"{theirs}.{{e}}.{layer}.weight", X), Rows(merged, start, start + F, axis=1)
            table[f"{ours}.{layer}"] = (single, rows, Whole(f"{theirs}.{layer}"))
    else:
        table[f"{ours}.up_proj"] = (Stacked(f"{theirs}.{{e}}.up_proj.weight", X), Whole(f"{theirs}.up_proj"))
    table[f"{ours}.down_proj"] = (Stacked(f"{theirs}.{{e}}.down_proj.weight", X), Whole(f"{theirs}.down_proj"))
    return table


def stack_weights(prefix: str, embed: str, norm: str, tied: bool) -> Weights:
    """Embedding, final norm and unembedding."""
    table: Weights = {
        "embed.weight": Whole(f"{prefix}{embed}.weight"),
        "ln_final.weight": Whole(f"{prefix}{norm}.weight"),
    }
    return table if tied else table | {"unembed.weight": Whole("lm_head.weight")}


def _ends(embed: str, norm: str) -> tuple[tuple[str, str], ...]:
    return ("embed", embed), ("ln_final", norm)


BlockWeights = Callable[[HybridConfig, int, str], Weights]
"""(config, layer, the beginning of its names in the file) -> table of one block, our names within the block."""


def table_of(cfg: HybridConfig, prefix: str, embed: str, norm: str, block: BlockWeights) -> Table:
    """The table of a whole model."""
    table = stack_weights(prefix, embed, norm, cfg.tie_embeddings)
    for i in range(cfg.n_layers):
        table |= {f"blocks.{i}.{name}": source for name, source in block(cfg, i, f"{prefix}layers.{i}").items()}
    return table


def read_state(
    state: Mapping[str, Tensor], cfg: HybridConfig, table: Table, dropped: tuple[str, ...] = ()
) -> LazyState:
    """The weights of a file; a tied unembedding that is stored as well must be the embedding.

    Raises
    ------
    CheckpointError
        Missing or unexpected tensors, by the file's names, or two embeddings where the config says tied.
    """
    if not cfg.tie_embeddings or "lm_head.weight" not in state:
        return read_table(state, table, dropped)
    embed = table.get("embed.weight")
    if isinstance(embed, Whole) and embed.name not in state:  # stored under the unembedding's name alone
        return read_table(state, {**table, "embed.weight": Whole("lm_head.weight")}, dropped)
    extended = {**table, "unembed.weight": Whole("lm_head.weight")}
    return drop_tied(read_table(state, extended, dropped), tied=True)


def prefix_of(state: Mapping[str, Tensor], prefix: str) -> str:
    """The beginning of the stack's names in a file: a bare backbone is saved without it."""
    return prefix if any(name.startswith(prefix) for name in state) else ""


def stack_config(cfg: HybridConfig) -> dict[str, Any]:
    """The fields of the stack under transformers' names, beside what the file said that is not computed here."""
    return dict(cfg.extra) | {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "vocab_size": cfg.d_vocab,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": list(cfg.eos_token_id) if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id,
        "pad_token_id": cfg.pad_token_id,
        "model_type": cfg.architecture,
    }


def attention_of(cfg: HybridConfig) -> AttentionConfig:
    """Attention, or of a model without it the simplest one: configs there describe it whether a layer has it or not."""
    d = cfg.d_model
    fields: dict[str, Any] = {"d_model": d, "n_layers": cfg.n_layers, "n_heads": 1, "n_key_value_heads": 1, "d_head": d}
    return cfg.branches.get("attn", AttentionConfig(**fields, rotary_dim=d - d % 2))


def mamba2_of(cfg: HybridConfig) -> Mamba2Config:
    """The Mamba-2 mixer, or the simplest one of a model without it."""
    d = cfg.d_model
    fields: dict[str, Any] = {"d_model": d, "n_layers": cfg.n_layers, "d_vocab": cfg.d_vocab}
    return cfg.branches.get("mixer", Mamba2Config(**fields, d_inner=2 * d, head_dim=2 * d, n_groups=1))


def attention_fields(cfg: AttentionConfig) -> dict[str, Any]:
    """Attention under transformers' names."""
    fields: dict[str, Any] = {
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "attention_bias": cfg.qkv_bias,
    }
    if cfg.d_head * cfg.n_heads != cfg.d_model:  # a key that the classes read and their configs do not list
        fields["head_dim"] = cfg.d_head
    if cfg.rotary_dim:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": cfg.rotary_base}
    return fields


def mamba2_fields(cfg: Mamba2Config) -> dict[str, Any]:
    """A Mamba-2 mixer under the names that begin with mamba_."""
    fields = {
        "mamba_n_heads": cfg.H,
        "mamba_d_head": cfg.P,
        "mamba_n_groups": cfg.G,
        "mamba_d_state": cfg.d_state,
        "mamba_d_conv": cfg.d_conv,
        "mamba_chunk_size": cfg.chunk_size,
        "mamba_conv_bias": cfg.conv_bias,
        "mamba_proj_bias": cfg.use_bias,
    }
    bounded = math.isfinite(cfg.dt_limit[1]) or cfg.dt_limit[0]  # infinity is no JSON number, and it is the default
    return fields | ({"time_step_limit": list(cfg.dt_limit)} if bounded else {})


def whole_multiple(cfg: MambaConfig | Mamba2Config) -> int:
    """`expand` as transformers wants it."""
    if cfg.E % cfg.d_model:
        raise CheckpointError(
            f"transformers takes whole multiples of d_model as inner width, got d_inner={cfg.E} for"
            f" d_model={cfg.d_model}"
        )
    return cfg.E // cfg.d_model


UNREAD = (
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "num_logits_to_keep",
    "router_aux_loss_coef",
    "output_router_logits",
    "z_loss_coefficient",
    "use_mamba_kernels",
)
"""Fields of files that change no logits here; kept in `extra` to be written back."""


def kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says that changes nothing here."""
    return {name: config[name] for name in UNREAD if name in config}
