"""What shapes the models of the delta rule: RWKV-7, gated DeltaNet."""

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
