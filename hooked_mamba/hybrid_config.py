"""The configuration of a hybrid: attention, MLP and MoE beside a state-space mixer, and which block has which."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hooked_mamba.config import BranchConfig, HeadedMambaConfig, Mamba2Config, MambaConfig, ModelConfig
from hooked_mamba.recurrent_config import DeltaNetConfig, Mamba3Config

Activation = Literal["silu", "gelu", "relu", "relu2"]
"""silu(x), the erf form of gelu(x), max(x, 0), max(x, 0)^2."""

Layout = tuple[tuple[tuple[str, ...], ...], ...]
"""Blocks of stages of branches: `((("mixer",), ("mlp",)), (("attn",), ("mlp",)))` is two blocks of two stages each."""


SHARED = (("attn",), ("mlp",), ("mixer",))
"""The layout of a block with a shared transformer."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(BranchConfig):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    n_heads: int
    """Query heads Q."""
    n_key_value_heads: int
    """Heads J of keys and values; each serves Q / J query heads."""
    d_head: int
    """Width c of a head."""
    scale: float | None = None
    """Factor of the scores. None: c^-0.5."""
    rotary_dim: int = 0
    """Numbers of each head that turn with the position (RoPE, Su et al. 2021, arXiv:2104.09864); 0: no positions."""
    rotary_base: float = 10000.0
    """Base theta of the frequencies theta^(-2i / rotary_dim)."""
    key_multiplier: float = 1.0
    """Factor of the keys, before they turn (Falcon-H1)."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    out_bias: bool = False
    """Whether the output projection has one."""
    qk_norm_eps: float | None = None
    """eps of RMS norms with weights on each head's query and key, before they turn (LFM2); None: there are none."""
    qk_norm_of_all: bool = False
    """Whether these norms are of all heads together (OLMo)."""
    output_gate: bool = False
    """Whether z is multiplied with sigmoid(W_gate x) before the output projection (Qwen3-Next)."""
    d_in: int | None = None
    """Width of the input. None: d_model."""
    d_out: int | None = None
    """Width of the output. None: d_model."""
    adapter_rank: int | None = None
    """Rank of an addition of low rank to the projections of queries, keys and values, each block its own (Zamba2);
    None: there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("n_heads", "n_key_value_heads", "d_head")
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(
                f"{self.n_heads} query heads cannot be shared evenly by n_key_value_heads={self.n_key_value_heads}"
            )
        if not 0 <= self.rotary_dim <= self.d_head or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and from 0 to d_head={self.d_head}, got {self.rotary_dim}")

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        return self.d_head**-0.5 if self.scale is None else self.scale

    @property
    def width_in(self) -> int:
        """The width of the input."""
        return self.d_model if self.d_in is None else self.d_in

    @property
    def width_out(self) -> int:
        """The width of the output."""
        return self.d_model if self.d_out is None else self.d_out


@dataclass(frozen=True, kw_only=True)
class MLPConfig(BranchConfig):
    """down(act(gate x) * up x), or down(act(up x)) if it is not gated."""

    d_mlp: int
    """Neurons F."""
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    gate_multiplier: float = 1.0
    """Factor of the gate before the activation (Falcon-H1)."""
    d_in: int | None = None
    """Width of the input. None: d_model."""
    output_gate: bool = False
    """Whether the output is multiplied with sigmoid(w . x), one number per position (Qwen3-Next's shared expert)."""
    adapter_rank: int | None = None
    """Rank of an addition of low rank to gate and up, each block its own (Zamba2); None: there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("d_mlp")

    @property
    def width_in(self) -> int:
        """The width of the input."""
        return self.d_model if self.d_in is None else self.d_in


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(BranchConfig):
    """A gated causal convolution of a few taps, with no state after it (LFM2)."""

    d_conv: int = 3
    """Taps K."""
    bias: bool = False
    """Whether the projections and the convolution have biases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("d_conv")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(BranchConfig):
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): each token goes to the k best of X experts."""

    n_experts: int
    """Experts X."""
    top_k: int
    """Experts k of each token."""
    d_mlp: int
    """Neurons F of an expert."""
    activation: Activation = "silu"
    gated: bool = True
    scoring: Literal["softmax", "sigmoid", "top_k_softmax"] = "softmax"
    """softmax over all experts; softmax over the chosen; or a sigmoid of each (DeepSeek-V3, arXiv:2412.19437)."""
    normalize: bool = False
    """Whether the weights of the chosen experts are divided by their sum."""
    routed_scale: float = 1.0
    """Factor of the weights."""
    correction_bias: bool = False
    """Whether a bias is added to the scores for the choice alone (sigmoid scoring)."""
    n_groups: int = 1
    """Groups of experts; only the best `top_k_groups` of them take part in the choice."""
    top_k_groups: int = 1
    d_latent: int | None = None
    """Width in which the experts work, between two projections; None: d_model, without them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("n_experts", "top_k", "d_mlp", "n_groups", "top_k_groups")
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} is more than n_experts={self.n_experts}")
        if self.n_experts % self.n_groups or self.top_k_groups > self.n_groups:
            raise ValueError(
                f"{self.n_experts} experts, n_groups={self.n_groups} and top_k_groups={self.top_k_groups} do not fit:"
                " groups are equal parts, and no more of them are chosen than there are"
            )

    @property
    def d_expert(self) -> int:
        """Width in which the experts work."""
        return self.d_model if self.d_latent is None else self.d_latent


def branch_of(entry: str) -> tuple[str, str]:
    """(name in the block, key of its config) of an entry of a layout: "mlp" and "mlp=shared"."""
    name, _, key = entry.partition("=")
    return name, key or name


@dataclass(frozen=True, kw_only=True)
class HybridConfig(ModelConfig):
    """A stack whose blocks differ, and the branches in them."""

    residual_in_fp32: bool = False
    branches: Mapping[str, Any] = field(default_factory=dict)
    """Name of a branch ("mixer", "attn", "mlp", "moe") -> what shapes it."""
    layout: Layout = ()
    """For each block its stages, for each stage the branches that read its norm. An entry is a name of `branches`, or
    "mlp=shared" for a branch called "mlp" in its block that is shaped by `branches["shared"]`."""
    shared: tuple[int | None, ...] | None = None
    """For each block the number of the transformer that stands in front of its mixer and that it shares with the other
    blocks of this number (Zamba), None where there is none; such a block is laid out as attn, mlp, mixer. None: no
    block has one."""
    in_scales: Mapping[str, float] = field(default_factory=dict)
    """Branch -> factor of what it reads; 1 where absent."""
    out_scales: Mapping[str, float] = field(default_factory=dict)
    """Branch -> factor of what it adds to the stream; 1 where absent."""
    embedding_multiplier: float = 1.0
    """Factor of the embedding."""
    logit_multiplier: float = 1.0
    """Factor of the logits."""
    norm_after: tuple[int, ...] = ()
    """Blocks whose norms stand behind their branches, `stream += norm(branch(stream))`, with one branch a stage
    (OLMo)."""
    architecture: str = "hybrid"
    """Which family it is of, as its checkpoints say ("bamba"); "hybrid" for one of your own."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What its family's files say beside all this, kept to write them back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layout = tuple(tuple(tuple(stage) for stage in block) for block in self.layout)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "norm_after", tuple(self.norm_after))
        if wrong := [i for i in self.norm_after if not 0 <= i < len(layout) or any(len(s) > 1 for s in layout[i])]:
            raise ValueError(
                f"norm_after={self.norm_after}: block {wrong[0]} does not have exactly one branch in each stage"
            )
        if len(layout) != self.n_layers:
            raise ValueError(f"layout has {len(layout)} blocks, expected n_layers={self.n_layers}")
        if self.shared is not None:
            object.__setattr__(self, "shared", tuple(self.shared))
            if len(self.shared) != self.n_layers:
                raise ValueError(f"shared has {len(self.shared)} entries, expected n_layers={self.n_layers}")
            for i, number in enumerate(self.shared):
                if number is not None and layout[i] != SHARED:
                    raise ValueError(
                        f"block {i} has the shared transformer {number}: expected {SHARED}, got {layout[i]}"
                    )
        for i, block in enumerate(layout):
            parts = [branch_of(entry) for stage in block for entry in stage]
            names, keys = [name for name, _ in parts], {key for _, key in parts}
            if keys - set(self.branches) or not names or len(set(names)) != len(names):
                raise ValueError(
                    f"block {i} of the layout is {block}; expected each name once, of {', '.join(self.branches)}"
                )
        for name, branch in self.branches.items():
            if (branch.d_model, branch.n_layers) != (self.d_model, self.n_layers):
                raise ValueError(
                    f"branch {name!r} is for d_model={branch.d_model} and n_layers={branch.n_layers}, the model has"
                    f" {self.d_model} and {self.n_layers}"
                )

    def __getattr__(self, name: str) -> Any:
        """Sizes of attention, MLPs and experts under their TransformerLens names, where all blocks agree on them."""
        branch, field = IN_BRANCHES.get(name, ("", ""))
        layout = self.__dict__.get("layout", ())
        entries = [branch_of(entry) for block in layout for stage in block for entry in stage]
        values = {getattr(self.branches[key], field) for found, key in entries if found == branch}
        if len(values) > 1:
            raise AttributeError(
                f"{name} is {' or '.join(map(str, sorted(values)))} in this model's blocks: see cfg.branches"
            )
        return values.pop() if values else super().__getattr__(name)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["branches"] = {
            name: {"config": type(branch).__name__, **branch.to_dict()} for name, branch in self.branches.items()
        }
        values["layout"] = [[list(stage) for stage in block] for block in self.layout]
        return values | {name: dict(values[name]) for name in ("in_scales", "out_scales", "extra")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HybridConfig:
        branches = {}
        for name, fields in values.get("branches", {}).items():
            kind, rest = fields.get("config"), {k: v for k, v in fields.items() if k != "config"}
            if kind not in BRANCH_CONFIGS:
                raise ValueError(f"branch {name!r} has config={kind!r}; expected one of {', '.join(BRANCH_CONFIGS)}")
            branches[name] = BRANCH_CONFIGS[kind].from_dict(rest)
        return super().from_dict({**values, "branches": branches})


IN_BRANCHES = {
    "n_heads": ("attn", "n_heads"),
    "n_key_value_heads": ("attn", "n_key_value_heads"),
    "d_head": ("attn", "d_head"),
    "rotary_dim": ("attn", "rotary_dim"),
    "rotary_base": ("attn", "rotary_base"),
    "d_mlp": ("mlp", "d_mlp"),
    "gated_mlp": ("mlp", "gated"),
    "act_fn": ("mlp", "activation"),
    "num_experts": ("moe", "n_experts"),
    "experts_per_token": ("moe", "top_k"),
}
"""TransformerLens' name of a size -> the branch that has it, and its field there."""

BRANCH_CONFIGS: dict[str, type[BranchConfig]] = {
    cls.__name__: cls
    for cls in (
        MambaConfig,
        HeadedMambaConfig,
        Mamba2Config,
        DeltaNetConfig,
        Mamba3Config,
        ShortConvConfig,
        AttentionConfig,
        MLPConfig,
        MoEConfig,
    )
}
"""Configs of branches by name, for files."""
