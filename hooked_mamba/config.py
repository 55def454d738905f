"""Configurations of a model and of the branches in its blocks: frozen and validated."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hooked_mamba.names_elsewhere import advice
from hooked_mamba.transformerlens_names import CONFIG

Config = TypeVar("Config", bound="BranchConfig")


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """The configuration of one branch of a block: a mixer, attention or an MLP."""

    d_model: int
    """Width d of the residual stream."""
    n_layers: int
    """Number of blocks."""

    def check_positive(self, *names: str) -> None:
        """Refuse fields that are no positive integers."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def __post_init__(self) -> None:
        self.check_positive("d_model", "n_layers")

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Build from a plain mapping; an unknown key is an error that names the nearest field."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{cls.__name__} has no field {key!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that :meth:`from_dict` reads back to an equal config."""
        return dataclasses.asdict(self)


LARGEST = 3.4e38
"""About the largest float32."""


def several_or_one(tokens: Sequence[int]) -> int | tuple[int, ...] | None:
    """A list of ids as a config holds it: a tuple of several, the id of one, None of none."""
    return tuple(tokens) if len(tokens) > 1 else tokens[0] if tokens else None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BranchConfig):
    """What every model's configuration has: its stack and its vocabulary."""

    d_vocab: int
    """Rows V of the embedding, padding rows included."""
    d_vocab_unpadded: int | None = None
    """Rows of the embedding that stand for tokens; the rest is padding. None: the checkpoint does not say."""
    eps: float = 1e-5
    """Added to the mean square in every block's norm and in the final norm."""
    tie_embeddings: bool = True
    """Whether the unembedding is the embedding's transpose (one and the same parameter)."""
    residual_in_fp32: bool = True
    """Whether the residual stream is float32 although the weights are bfloat16 or float16."""
    bos_token_id: int | None = None
    """Token put in front when `prepend_bos` is asked for. The tokenizer's own wins where it has one."""
    eos_token_id: int | Sequence[int] | None = None
    """Token at which generation stops, or several (kept as a tuple), each of which stops it. The tokenizer's own wins
    over a single one."""
    pad_token_id: int | None = None
    """Token that fills padded positions; it is masked, so its value changes nothing."""
    model_name: str = "custom"
    """Where the weights came from, for cards and titles."""

    def __getattr__(self, name: str) -> Any:
        """Called only for unknown names; for TransformerLens' fields the error says what to use here."""
        if name in CONFIG:
            raise AttributeError(advice(name, CONFIG))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("d_vocab")
        if isinstance(self.eos_token_id, list | tuple):
            object.__setattr__(self, "eos_token_id", several_or_one(self.eos_token_id))
        if self.d_vocab_unpadded is not None and not 1 <= self.d_vocab_unpadded <= self.d_vocab:
            raise ValueError(
                f"d_vocab_unpadded must be from 1 to d_vocab={self.d_vocab}, got {self.d_vocab_unpadded!r}"
            )
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps!r}")


@dataclass(frozen=True, kw_only=True)
class SSMConfig(ModelConfig):
    """What both Mamba families have. Use :class:`MambaConfig` or :class:`Mamba2Config`."""

    d_state: int = 16
    """State size N: numbers of memory per channel."""
    d_conv: int = 4
    """Taps K of the causal depthwise convolution."""
    expand: int | float = 2
    """Inner width E as a multiple of d_model, unless `d_inner` is given."""
    d_inner: int | None = None
    """Inner width E. None: int(expand * d_model)."""
    use_bias: bool = False
    """Whether in_proj and out_proj have biases."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    dt_min: float = 0.001
    """Smallest step size drawn when weights are initialised at random (`time_step_min`)."""
    dt_max: float = 0.1
    """Largest step size drawn when weights are initialised at random (`time_step_max`)."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the drawn step size (`time_step_floor`)."""

    def __post_init__(self) -> None:
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", int(self.expand * self.d_model))
        super().__post_init__()
        self.check_positive("d_state", "d_conv", "d_inner")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"expected 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")

    @property
    def E(self) -> int:
        """The inner width, by its symbol."""
        assert self.d_inner is not None  # __post_init__ fills it
        return self.d_inner

    @property
    def conv_dim(self) -> int:
        """Channels that pass the convolution."""
        return self.E


@dataclass(frozen=True, kw_only=True)
class MambaConfig(SSMConfig):
    """Mamba-1 (Gu & Dao 2023, arXiv:2312.00752) and, with `mixer_norms`, Falcon-Mamba (arXiv:2410.05355)."""

    dt_rank: int | None = None
    """Rank R of the step-size projection. None: ceil(d_model / 16)."""
    mixer_norms: bool = False
    """Falcon-Mamba: RMS norms without weight on low-rank dt, B and C, before dt_proj and the scan."""
    mixer_norm_weights: bool = False
    """Jamba (arXiv:2403.19887): the mixer's own norms have weights."""
    mixer_norm_eps: float = 1e-6
    """eps of the mixer's own norms (Falcon-Mamba's `mixer_rms_eps`); without `mixer_norms` it has no use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        if self.mixer_norm_weights and not self.mixer_norms:
            raise ValueError("mixer_norm_weights=True needs mixer_norms=True: there are no norms to weigh")
        if not isinstance(self.dt_rank, int) or self.dt_rank < 1:
            raise ValueError(f"dt_rank must be a positive integer or None, got {self.dt_rank!r}")

    @property
    def R(self) -> int:
        """The rank of the step-size projection, by its symbol."""
        assert self.dt_rank is not None  # __post_init__ fills it
        return self.dt_rank


@dataclass(frozen=True, kw_only=True)
class HeadedMambaConfig(MambaConfig):
    """Mamba-1 whose channels are heads with their own dt, B and C (Zamba, arXiv:2405.16712)."""

    n_heads: int = 2
    """Heads G of E / G channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("n_heads")
        if self.E % self.n_heads:
            raise ValueError(f"d_inner={self.E} is not a multiple of n_heads={self.n_heads}")
        if self.mixer_norms:
            raise ValueError("mixer_norms=True: heads with a selection of their own have no norms inside")


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(SSMConfig):
    """Mamba-2 (Dao & Gu 2024, arXiv:2405.21060)."""

    d_state: int = 128
    """State size N per head channel."""
    head_dim: int = 64
    """Channels P of one head; H = E / P heads share one step size and one scalar A each."""
    n_groups: int = 1
    """Groups G: heads of a group share B and C."""
    norm_groups: int | None = None
    """Groups over which the gated norm takes its mean square. None: n_groups."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Clamp of the step size after softplus (`time_step_limit`)."""
    norm_eps: float | None = None
    """eps of the gated norm in the mixer. None: eps."""
    gated_norm: Literal["gate_first", "norm_first", "none"] = "gate_first"
    """norm(y SiLU(z)), norm(y) SiLU(z), or no norm at all (both in Falcon-H1)."""
    in_scales: tuple[float, float, float, float, float] | None = None
    """Factors of z, x, B, C and dt right behind in_proj (Falcon-H1); None: all 1."""
    out_bias: bool | None = None
    """Whether out_proj has a bias (Falcon-H1 says so apart); None: as in_proj, by use_bias."""
    chunk_size: int = 64
    """Positions per chunk that the checkpoint names; kept to write it back. Our scan chooses its own: same results."""
    A_init_range: tuple[float, float] = (1.0, 16.0)
    """Interval from which -A is drawn when weights are initialised at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_groups is None:
            object.__setattr__(self, "norm_groups", self.n_groups)
        if self.norm_eps is None:
            object.__setattr__(self, "norm_eps", self.eps)
        low, high = self.dt_limit  # a list after JSON; kept a tuple so that equal configs compare equal
        high = math.inf if high > LARGEST else high  # 1e308 and the like stand for no bound
        object.__setattr__(self, "dt_limit", (float(low), float(high)))
        object.__setattr__(self, "A_init_range", tuple(map(float, self.A_init_range)))
        self.check_positive("head_dim", "n_groups", "norm_groups", "chunk_size")
        if self.gated_norm not in ("gate_first", "norm_first", "none"):
            raise ValueError(f"gated_norm must be 'gate_first', 'norm_first' or 'none', got {self.gated_norm!r}")
        if self.in_scales is not None:
            object.__setattr__(self, "in_scales", tuple(map(float, self.in_scales)))
            if len(self.in_scales) != 5:
                raise ValueError(f"in_scales must be five factors, of z, x, B, C and dt, got {self.in_scales}")
        if self.E % self.head_dim:
            raise ValueError(f"d_inner={self.E} is not a multiple of head_dim={self.head_dim}")
        if self.H % self.n_groups:
            raise ValueError(f"{self.H} heads cannot be shared evenly by n_groups={self.n_groups}")
        if self.E % self.gated_norm_groups:
            raise ValueError(f"d_inner={self.E} is not a multiple of norm_groups={self.norm_groups}")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {self.dt_limit}")

    @property
    def has_out_bias(self) -> bool:
        """Whether out_proj has a bias."""
        return self.use_bias if self.out_bias is None else self.out_bias

    @property
    def H(self) -> int:
        """Heads."""
        return self.E // self.head_dim

    @property
    def P(self) -> int:
        """Channels of one head, by its symbol."""
        return self.head_dim

    @property
    def G(self) -> int:
        """Groups that share B and C, by its symbol."""
        return self.n_groups

    @property
    def gated_norm_groups(self) -> int:
        """Groups of the gated norm."""
        assert self.norm_groups is not None  # __post_init__ fills it
        return self.norm_groups

    @property
    def gated_norm_eps(self) -> float:
        """eps of the gated norm."""
        assert self.norm_eps is not None  # __post_init__ fills it
        return self.norm_eps

    @property
    def conv_dim(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.E + 2 * self.G * self.d_state
