"""Options of a training, validated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saes.options import OptionError, check_choice, check_number, from_mapping, read_file


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training. Two with equal options, data and seeds give equal weights, bit for bit, on one machine's CPU.

    Give exactly one of `n_tokens` and `steps` as its length.
    """

    n_tokens: int | None = None
    """Positions to train on, repeats counted; the last step may go a batch beyond."""
    steps: int | None = None
    """Optimiser steps."""
    lr: float | None = None
    """Peak learning rate. None: 6e-4 / sqrt(d_sae / 16384), so that wider dictionaries take smaller steps."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.3
    """Share of the steps, the last ones, over which it falls to 0."""
    beta1: float = 0.9
    beta2: float = 0.999
    """Adam's."""
    grad_clip: float | None = 1.0
    """Largest norm of one coder's gradient, of the loss per output dimension; None: any."""
    decoder_norm: bool = True
    """Decoder rows of norm 1; the gradient's component along each row is removed first."""
    b_dec: str = "mean"
    """Initial b_dec: the target's "mean", its geometric "median", or "zero"."""
    init_tokens: int = 8192
    """Positions from which that and the scales of cfg.input_norm are estimated."""
    dead_after_tokens: int = 1_000_000
    """Tokens without activity after which a latent counts as dead."""
    aux_alpha: float = 1 / 32
    """Weight of the dead latents' loss (AuxK)."""
    aux_k: int | None = None
    """Dead latents that reconstruct the error; None: k, or half of d_out where there is no k."""
    wide_alpha: float = 0.0
    """Weight of a second reconstruction with twice as many latents (topk, batchtopk). At 0.5 it finds more of a planted
    dictionary; at the cost of encoding and decoding them."""
    sparsity: float = 0.0
    """Weight of the sparsity penalty (standard, gated, jumprelu)."""
    sparsity_warmup: float = 0.1
    """Share of the steps over which that weight rises from 0."""
    bandwidth: float = 0.1
    """Of JumpReLU's straight-through gradient."""
    autocast: str | None = None
    """"bfloat16": matrix products in half precision, on CUDA only."""
    seed: int = 0
    """Of torch's random state."""
    log_every: int = 50
    """Steps between lines of the log."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints that are kept."""
    progress: bool = True
    """Whether a progress bar is shown."""

    def __post_init__(self) -> None:
        if (self.n_tokens is None) == (self.steps is None):
            both = "neither" if self.steps is None else "both"
            raise OptionError(f"give n_tokens= or steps=, one of them; got {both}")
        for name in ("n_tokens", "steps", "aux_k"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, whole=True)
        for name in ("init_tokens", "log_every", "checkpoint_every", "keep"):
            check_number(name, getattr(self, name), 1, whole=True)
        for name in ("seed", "dead_after_tokens"):
            check_number(name, getattr(self, name), 0, whole=True)
        for name in ("warmup", "decay", "sparsity_warmup", "beta1", "beta2"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("aux_alpha", "wide_alpha", "sparsity", "bandwidth"):
            check_number(name, getattr(self, name), 0)
        for name in ("lr", "grad_clip"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        for name in ("decoder_norm", "progress"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("b_dec", self.b_dec, ("mean", "median", "zero"))
        check_choice("autocast", self.autocast, (None, "bfloat16"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a plain mapping; an unknown key is an error that names the nearest option."""
        return from_mapping(cls, values)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """From a JSON or TOML file of these options."""
        return cls.from_dict(read_file(path))

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, fit for JSON."""
        return dataclasses.asdict(self)

    def same_run(self) -> dict[str, Any]:
        """The options that the weights depend on: what a resumed run must share."""
        free = ("log_every", "checkpoint_every", "keep", "progress")
        return {name: value for name, value in self.to_dict().items() if name not in free}

    def n_steps(self, batch_size: int) -> int:
        """Steps in all, at this many positions a step."""
        if self.steps is not None:
            return self.steps
        assert self.n_tokens is not None
        return math.ceil(self.n_tokens / batch_size)

    def highest_lr(self, d_sae: int) -> float:
        """The learning rate between warm-up and decay."""
        return self.lr if self.lr is not None else 6e-4 / math.sqrt(d_sae / 16384)

    def lr_factor(self, step: int, n_steps: int) -> float:
        """The learning rate's factor at a step: linear warm-up, plateau, linear decay."""
        rise, fall = self.warmup * n_steps, self.decay * n_steps
        up = (step + 1) / rise if rise > 0 else 1.0
        down = (n_steps - step) / fall if fall > 0 else 1.0
        return min(1.0, up, down)

    def sparsity_at(self, step: int, n_steps: int) -> float:
        """The weight of the sparsity penalty at a step."""
        rise = self.sparsity_warmup * n_steps
        return self.sparsity * (min(1.0, (step + 1) / rise) if rise > 0 else 1.0)
