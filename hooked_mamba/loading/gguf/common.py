"""What the architectures of GGUF files have in common: the stack, both Mamba mixers, attention, MLPs and experts.

Names are those of llama.cpp: `blk.{i}.` and a word for each weight. Whether a bias exists, the unembedding is a tensor
of its own, or a layer is of one kind or another is seen from the tensors, which are there or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.hybrid_config import AttentionConfig, MLPConfig, MoEConfig
from hooked_mamba.loading.gguf.keys import Keys, text_of
from hooked_mamba.loading.gguf.sources import Decay, Shaped, Unpaired
from hooked_mamba.loading.shapes import only_shapes
from hooked_mamba.loading.sources import Source, Whole
from hooked_mamba.loading.tables import CheckpointError

EPS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")

State = Mapping[str, Tensor]
Weights = dict[str, Source | tuple[Source, ...]]


def shape_of(state: State, keys: Keys, name: str, axes: int) -> tuple[int, ...]:
    """A tensor's shape.

    Raises
    ------
    CheckpointError
        It is not there or has other axes.
    """
    if name not in state:
        raise CheckpointError(f"{keys.path} lacks the tensor {name}, which determines sizes of the model")
    with only_shapes():
        shape = tuple(state[name].shape)
    if len(shape) != axes:
        raise CheckpointError(f"{keys.path}: the tensor {name} has the shape {shape}; expected {axes} axes")
    return shape


def layers(keys: Keys, state: State) -> int:
    """Number of blocks, without those that only predict further tokens."""
    n = keys.count("block_count")
    if n > len(state):
        raise keys.fault("block_count", f"no more than the file's {len(state)} tensors")
    further = keys.count("nextn_predict_layers", 0, least=0)
    if further >= n:
        raise keys.fault("nextn_predict_layers", f"less than the {n} blocks")
    return n - further


def stack(keys: Keys, state: State) -> dict[str, Any]:
    """The fields of the stack itself; eps stands under one of two keys, depending on what the config called it.

    Raises
    ------
    CheckpointError
        A key is missing or of another type, or the embedding is not as wide as it says.
    """
    rows, width = shape_of(state, keys, "token_embd.weight", 2)
    d = keys.count("embedding_length")
    eps = next((name for name in EPS if keys.has(name)), EPS[0])
    if width != d:
        raise keys.fault("embedding_length", f"{width}, the width of token_embd.weight")
    return {
        "d_model": d,
        "n_layers": layers(keys, state),
        "d_vocab": rows,
        "eps": keys.number(eps),
        "tie_embeddings": "output.weight" not in state,
        "bos_token_id": keys.token("bos"),
        "eos_token_id": keys.token("eos"),
        "pad_token_id": keys.token("padding"),
    }


def shared_fields(stack: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the stack that a mixer's config repeats."""
    return {name: stack[name] for name in ("d_model", "n_layers", "d_vocab", "eps")}


def any_block(state: State, n: int, weight: str) -> bool:
    """Whether some block has a weight."""
    return any(f"blk.{i}.{weight}" in state for i in range(n))


def kinds(keys: Keys, state: State, n: int, words: Mapping[str, str]) -> list[str]:
    """The branch of each block, told by a weight that only this kind has (`words`: weight -> branch).

    Raises
    ------
    CheckpointError
        A block without any of them.
    """
    found = []
    for i in range(n):
        branch = next((branch for weight, branch in words.items() if f"blk.{i}.{weight}" in state), None)
        if branch is None:
            there = f"blk.{i}.({' or '.join(words)})"
            raise CheckpointError(f"{keys.path} has none of the tensors {there}, which say what block {i} is")
        found.append(branch)
    return found


# Branches' configs -------------------------------------------------------------------------------------------------


def mamba(keys: Keys, state: State, fields: Mapping[str, Any], **more: Any) -> MambaConfig:
    """A Mamba-1 mixer."""
    n = fields["n_layers"]
    return MambaConfig(
        **(
            dict(fields)
            | {
                "d_state": keys.count("ssm.state_size"),
                "d_conv": keys.count("ssm.conv_kernel"),
                "d_inner": keys.count("ssm.inner_size"),
                "dt_rank": keys.count("ssm.time_step_rank"),
                "use_bias": any_block(state, n, "ssm_in.bias"),
                "conv_bias": any_block(state, n, "ssm_conv1d.bias"),
            }
            | more
        )
    )


def mamba2(keys: Keys, state: State, fields: Mapping[str, Any], **more: Any) -> Mamba2Config:
    """A Mamba-2 mixer; `ssm.time_step_rank` is its number of heads."""
    n, E, H = fields["n_layers"], keys.count("ssm.inner_size"), keys.count("ssm.time_step_rank")
    if E % H:
        raise keys.fault("ssm.time_step_rank", f"a number of heads that {E} channels divide among")
    return Mamba2Config(
        **(
            dict(fields)
            | {
                "d_state": keys.count("ssm.state_size"),
                "d_conv": keys.count("ssm.conv_kernel"),
                "d_inner": E,
                "head_dim": E // H,
                "n_groups": keys.count("ssm.group_count"),
                "use_bias": any_block(state, n, "ssm_in.bias"),
                "conv_bias": any_block(state, n, "ssm_conv1d.bias"),
            }
            | more
        )
    )


def attention(keys: Keys, state: State, stack: Mapping[str, Any], rotary: bool, **more: Any) -> AttentionConfig:
    """Attention; the number of key and value heads may be given for each layer, 0 where there is none.

    Raises
    ------
    CheckpointError
        Layers with different numbers of heads.
    """
    d, n = stack["d_model"], stack["n_layers"]
    total = keys.count("block_count")
    heads = _one_number(keys, "attention.head_count", total)
    d_head = keys.count("attention.key_length", d // heads or 1)
    if keys.count("attention.value_length", d_head) != d_head:
        raise keys.fault("attention.value_length", f"{d_head}, the length of keys")
    queries = next((full for i in range(n) if (full := f"blk.{i}.attn_q.weight") in state), None)
    rows = shape_of(state, keys, queries, 2)[0] if queries is not None else heads * d_head
    if heads * d_head > rows:  # before anything is made for each head
        raise keys.fault("attention.head_count", f"heads of {d_head} that the {rows} rows of {queries} hold")
    fields: dict[str, Any] = {
        "n_heads": heads,
        "n_key_value_heads": _one_number(keys, "attention.head_count_kv", total),
        "d_head": d_head,
        "qkv_bias": any_block(state, n, "attn_q.bias"),
        "out_bias": any_block(state, n, "attn_output.bias"),
    }
    if rotary:
        _refuse_scaled_positions(keys)
        if "rope_freqs.weight" in state:
            raise CheckpointError(f"{keys.path} has the tensor rope_freqs.weight: scaled positions, not computed here")
        fields |= {
            "rotary_dim": keys.count("rope.dimension_count", d_head),
            "rotary_base": keys.number("rope.freq_base", 10000.0),
        }
    return AttentionConfig(d_model=d, n_layers=n, **(fields | more))


def _refuse_scaled_positions(keys: Keys) -> None:
    """Refuse a file whose positions are divided; of a factor without a type llama.cpp takes the type "linear"."""
    kind = text_of(keys.values, keys.full("rope.scaling.type"))
    if kind not in (None, "none"):
        raise keys.fault("rope.scaling.type", "'none': scaled positions are not computed here")
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if kind is None and keys.values.get(keys.full(name), 0) not in (0, 1):
            raise keys.fault(name, "1, or rope.scaling.type 'none': scaled positions are not computed here")


def _one_number(keys: Keys, name: str, n: int) -> int:
    found = sorted({one for one in keys.counts(name, n) if one})
    if len(found) != 1:
        raise keys.fault(name, "one number for all layers that have attention")
    return found[0]


def mlp(keys: Keys, stack: Mapping[str, Any], d_mlp: int, **more: Any) -> MLPConfig:
    """An MLP."""
    return MLPConfig(d_model=stack["d_model"], n_layers=stack["n_layers"], d_mlp=d_mlp, **more)


def neurons(keys: Keys, n: int, name: str = "feed_forward_length") -> int:
    """Neurons of the MLPs, given once or for each layer (0 where there is none)."""
    return _one_number(keys, name, n)


def experts(keys: Keys, stack: Mapping[str, Any], d_mlp: int, **more: Any) -> MoEConfig:
    """A mixture of experts."""
    return MoEConfig(
        d_model=stack["d_model"],
        n_layers=stack["n_layers"],
        n_experts=keys.count("expert_count"),
        top_k=keys.count("expert_used_count"),
        d_mlp=d_mlp,
        **more,
    )


# Weights -----------------------------------------------------------------------------------------------------------


def stack_weights(tied: bool, norm: str = "output_norm") -> Weights:
    """Embedding, final norm and unembedding."""
    table: Weights = {"embed.weight": Whole("token_embd.weight"), "ln_final.weight": Whole(f"{norm}.weight")}
    return table if tied else table | {"unembed.weight": Whole("output.weight")}


def block(table: Weights, i: int) -> Weights:
    """The table of one block under our full names."""
    return {f"blocks.{i}.{name}": source for name, source in table.items()}


def _conv(there: str, channels: int, taps: int, bias: bool) -> Weights:
    table: Weights = {"mixer.conv1d.weight": Shaped(f"{there}.ssm_conv1d.weight", (channels, 1, taps))}
    return table | ({"mixer.conv1d.bias": Whole(f"{there}.ssm_conv1d.bias")} if bias else {})


def _projections(there: str, in_bias: bool, out_bias: bool) -> Weights:
    table: Weights = {
        "mixer.in_proj.weight": Whole(f"{there}.ssm_in.weight"),
        "mixer.out_proj.weight": Whole(f"{there}.ssm_out.weight"),
    }
    table |= {"mixer.in_proj.bias": Whole(f"{there}.ssm_in.bias")} if in_bias else {}
    return table | ({"mixer.out_proj.bias": Whole(f"{there}.ssm_out.bias")} if out_bias else {})


def mamba_weights(there: str, cfg: MambaConfig) -> Weights:
    """A Mamba-1 mixer."""
    table = _projections(there, cfg.use_bias, cfg.use_bias) | _conv(there, cfg.E, cfg.d_conv, cfg.conv_bias)
    table |= {
        "mixer.x_proj.weight": Whole(f"{there}.ssm_x.weight"),
        "mixer.dt_proj.weight": Whole(f"{there}.ssm_dt.weight"),
        "mixer.dt_proj.bias": Whole(f"{there}.ssm_dt.bias"),
        "mixer.A_log": Decay(f"{there}.ssm_a", (cfg.E, cfg.d_state)),
        "mixer.D": Whole(f"{there}.ssm_d"),
    }
    if cfg.mixer_norm_weights:
        table |= {f"mixer.{v}_norm_weight": Whole(f"{there}.ssm_{v.lower()}_norm.weight") for v in ("dt", "B", "C")}
    return table


def mamba2_weights(there: str, cfg: Mamba2Config) -> Weights:
    """A Mamba-2 mixer."""
    table = _projections(there, cfg.use_bias, cfg.has_out_bias) | _conv(there, cfg.conv_dim, cfg.d_conv, cfg.conv_bias)
    table |= {
        "mixer.dt_bias": Whole(f"{there}.ssm_dt.bias"),
        "mixer.A_log": Decay(f"{there}.ssm_a", (cfg.H,)),
        "mixer.D": Shaped(f"{there}.ssm_d", (cfg.H,)),
    }
    return table | ({"mixer.norm.weight": Shaped(f"{there}.ssm_norm.weight", (cfg.E,))} if _normed(cfg) else {})


def _normed(cfg: Mamba2Config) -> bool:
    return cfg.gated_norm != "none"


def attention_weights(there: str, cfg: AttentionConfig, paired: bool = False) -> Weights:
    """Four projections; `paired` where the converter put the rows side by side that turn together."""
    table: Weights = {}
    ends = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    for p, name in ends.items():
        biased = cfg.out_bias if p == "o" else cfg.qkv_bias
        for kind in ("weight", "bias") if biased else ("weight",):
            full = f"{there}.{name}.{kind}"
            heads = cfg.n_heads if p == "q" else cfg.n_key_value_heads
            table[f"attn.{p}_proj.{kind}"] = Unpaired(full, heads) if paired and p in "qk" else Whole(full)
    return table


def mlp_weights(there: str, cfg: MLPConfig, ending: str = "") -> Weights:
    """An MLP of separate matrices; `ending` is "_shexp" of one that stands beside experts."""
    layers = ("gate", "up", "down") if cfg.gated else ("up", "down")
    kinds = ("weight", "bias") if cfg.bias else ("weight",)
    return {
        f"mlp.{layer}_proj.{kind}": Whole(f"{there}.ffn_{layer}{ending}.{kind}") for layer in layers for kind in kinds
    }


def expert_weights(there: str, cfg: MoEConfig) -> Weights:
    """The router, and all experts of a layer in one tensor a matrix."""
    layers = ("gate", "up", "down") if cfg.gated else ("up", "down")
    table: Weights = {f"moe.{layer}_proj": Whole(f"{there}.ffn_{layer}_exps.weight") for layer in layers}
    return table | {"moe.router.weight": Whole(f"{there}.ffn_gate_inp.weight")}


def further(keys: Keys, n: int) -> tuple[str, ...]:
    """Beginnings of the names of blocks that only predict further tokens; they are left out."""
    return tuple(f"blk.{i}." for i in range(n, keys.count("block_count")))
