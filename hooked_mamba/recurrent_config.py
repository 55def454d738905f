"""Configurations of the recurrences after Mamba-2: RWKV-7, gated DeltaNet, Mamba-3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_mamba.config import BranchConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(ModelConfig):
    """RWKV-7 (Peng et al. 2025, arXiv:2503.14456)."""

    head_dim: int = 64
    """Keys K and values V of a head; H = d / K heads."""
    d_mlp: int | None = None
    """Neurons F of the channel mix. None: 4 d."""
    decay_rank: int = 64
    """Rank of the projection to the decay w."""
    rate_rank: int = 64
    """Rank of the projection to the in-context learning rate a."""
    value_rank: int = 32
    """Rank of the projection to nu, which mixes in the first layer's value."""
    gate_rank: int = 128
    """Rank of the projection to the gate g."""
    head_eps: float | None = None
    """Added to the variance of each head's output. None: 1e-5 K."""
    tie_embeddings: bool = False
    residual_in_fp32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_mlp is None:
            object.__setattr__(self, "d_mlp", 4 * self.d_model)
        if self.head_eps is None:
            object.__setattr__(self, "head_eps", 1e-5 * self.head_dim)
        self.check_positive("head_dim", "d_mlp", "decay_rank", "rate_rank", "value_rank", "gate_rank")
        if self.d_model % self.head_dim:
            raise ValueError(f"d_model={self.d_model} is not a multiple of head_dim={self.head_dim}")

    @property
    def H(self) -> int:
        """Heads."""
        return self.d_model // self.head_dim

    @property
    def K(self) -> int:
        """Keys, and values, of a head, by its symbol."""
        return self.head_dim

    @property
    def F(self) -> int:
        """Neurons of the channel mix, by their symbol."""
        assert self.d_mlp is not None  # __post_init__ fills it
        return self.d_mlp

    @property
    def norm_eps_of_heads(self) -> float:
        """What is added to the variance of each head's output."""
        assert self.head_eps is not None  # __post_init__ fills it
        return self.head_eps


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(BranchConfig):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464), one branch of a hybrid's blocks."""

    n_key_heads: int
    """Heads of queries and keys."""
    n_value_heads: int
    """Heads H of values; value head j reads key head j // (H / key heads)."""
    key_dim: int
    """Keys K of a head."""
    value_dim: int
    """Values V of a head."""
    d_conv: int = 4
    """Taps of the causal convolution over q, k and v; 0: no convolution, SiLU alone."""
    conv_bias: bool = False
    norm_eps: float = 1e-6
    """eps of the norm of each head's output."""
    gate: Literal["silu", "sigmoid", "none"] = "silu"
    """What the gate's branch passes before it multiplies the normed output."""
    negative_eigenvalues: bool = False
    """Whether beta lies in (0, 2), so that a removal may turn the sign of what it finds."""
    A_init_range: tuple[float, float] = (1.0, 16.0)
    """Interval from which the decay's rate is drawn when weights are initialised at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "A_init_range", tuple(map(float, self.A_init_range)))
        self.check_positive("n_key_heads", "n_value_heads", "key_dim", "value_dim")
        if self.n_value_heads % self.n_key_heads:
            raise ValueError(
                f"{self.n_value_heads} value heads cannot be shared evenly by {self.n_key_heads} key heads"
            )
        if self.d_conv < 0:
            raise ValueError(f"d_conv must be 0 (no convolution) or more, got {self.d_conv}")

    @property
    def conv_dim(self) -> int:
        """Channels of q, k and v together."""
        return 2 * self.n_key_heads * self.key_dim + self.n_value_heads * self.value_dim

    @property
    def E(self) -> int:
        """Channels of the values."""
        return self.n_value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class Mamba3Config(BranchConfig):
    """Mamba-3 with single input and output (arXiv:2603.15569), one branch of a hybrid's blocks."""

    A_act: Literal["softplus", "heavy_tail"]
    """f of the decay's rate: softplus(x), or 1 + x above 0 and 1 / (1 - x) below. Both have been published under the
    same names of weights, and no file says which one it was trained with."""
    d_state: int = 128
    """States N of a channel."""
    expand: int = 2
    """Channels E as a multiple of d_model."""
    head_dim: int = 64
    """Channels P of a head."""
    n_groups: int = 1
    """Groups of heads that share B and C."""
    rope_fraction: float = 0.5
    """Share of the states that turn."""
    A_floor: float = 1e-4
    """The smallest rate of decay."""
    norm_eps: float = 1e-5
    """eps of the norms of B and C, and of the heads' norm."""
    norm_of_heads: bool = False
    """Whether an RMS norm of each head stands before the gate."""
    use_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("d_state", "expand", "head_dim", "n_groups")
        if self.A_act not in ("softplus", "heavy_tail"):
            raise ValueError(f"A_act must be 'softplus' or 'heavy_tail', got {self.A_act!r}")
        if self.E % self.head_dim or self.H % self.n_groups:
            raise ValueError(
                f"{self.E} channels in heads of {self.head_dim} and {self.n_groups} groups do not fit: heads and groups"
                " are equal parts"
            )
        if self.S < 1:
            raise ValueError(f"d_state={self.d_state} and rope_fraction={self.rope_fraction} leave no pair to turn")

    @property
    def E(self) -> int:
        """Channels."""
        return self.expand * self.d_model

    @property
    def H(self) -> int:
        """Heads."""
        return self.E // self.head_dim

    @property
    def S(self) -> int:
        """Angles: pairs of states that are rotated."""
        return int(self.d_state * self.rope_fraction) // 2

    @property
    def in_widths(self) -> tuple[int, ...]:
        """Rows of in_proj: z, x, B, C, dt, A, lam, angles."""
        GN = self.n_groups * self.d_state
        return self.E, self.E, GN, GN, self.H, self.H, self.H, self.S


@dataclass(frozen=True, kw_only=True)
class Mamba3MIMOConfig(Mamba3Config):
    """Mamba-3 with several inputs and outputs of each head (arXiv:2603.15569), one branch of a hybrid's blocks."""

    mimo_rank: int = 4
    """Ranks R: how often a state is written and read at each position."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("mimo_rank")
        if self.d_state % 2:
            raise ValueError(f"d_state must be even, so that states i and i + N/2 are pairs; got {self.d_state}")

    @property
    def in_widths(self) -> tuple[int, ...]:
        """Rows of in_proj: z, x, B, C, dt, A, lam, angles."""
        z, x, B, C, *rest = super().in_widths
        return z, x, self.mimo_rank * B, self.mimo_rank * C, *rest
