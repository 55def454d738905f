"""What shapes the models of the delta rule: RWKV-7."""

from __future__ import annotations

from dataclasses import dataclass

from hooked_mamba.config import ModelConfig


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
