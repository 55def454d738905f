"""What a training run may be told: the options of `demos.localisation`, and the shape of a hybrid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from demos.localisation import options as localisation
from demos.localisation.options import about


@dataclass(frozen=True, kw_only=True)
class Options(localisation.Options):
    """One training run. Two runs with equal options give equal weights, bit for bit, on one machine."""

    program: ClassVar[str] = "demos.hybrid.train"

    task: str = field(default="recall", metadata=about("recall or induction"))
    size: int | None = field(default=32, metadata=about("recall: pairs of a prompt", 2))
    vocab: int = field(default=128, metadata=about("tokens; half of them are keys, half values", 4))
    d_state: int = field(default=8, metadata=about("state size N of the Mamba-2 mixers", 1))
    batch: int = field(default=64, metadata=about("sequences a step", 1))
    questions: int = field(default=32, metadata=about("questions a sequence", 1))
    pattern: str = field(default="M*", metadata=about("a letter per block: M for Mamba-2, * for attention"))
    head_dim: int = field(default=32, metadata=about("channels of a head of Mamba-2", 1))
    n_heads: int = field(default=6, metadata=about("heads of attention", 1))
    d_head: int = field(default=16, metadata=about("their width", 1))
    d_mlp: int = field(default=64, metadata=about("neurons of the MLP", 1))
    n_experts: int = field(default=4, metadata=about("experts", 1))
    top_k: int = field(default=2, metadata=about("experts of each token", 1))
    d_expert: int = field(default=32, metadata=about("neurons of an expert", 1))
    balance: float = field(default=0.01, metadata=about("weight of the term that evens the experts' load", 0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.pattern) - set("M*") or len(self.pattern) != self.n_layers:
            raise ValueError(f"pattern must be {self.n_layers} letters (n_layers), M or * each, got {self.pattern!r}")
