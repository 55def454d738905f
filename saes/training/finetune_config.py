"""Options of a fine-tuning through the model, validated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saes.options import OptionError, check_choice, check_number, from_mapping


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tuning. Exactly one of `n_tokens` and `steps` says how long."""

    n_tokens: int | None = None
    """Positions to train on, repeats counted; the last step may go a batch beyond."""
    steps: int | None = None
    """Optimiser steps."""
    lr: float = 3e-4
    """Peak learning rate."""
    warmup: float = 0.02
    """Share of the steps over which it rises from 0."""
    decay: float = 1.0
    """Share of the steps, the last ones, over which it falls to 0."""
    beta1: float = 0.9
    beta2: float = 0.999
    """Adam's."""
    grad_clip: float | None = 1.0
    """Largest norm of all coders' gradient together; None: any."""
    reconstruction: float = 1.0
    """Weight of the coders' mean share of variance that is missed, beside the divergence in nats."""
    seed: int = 0
    """Of the order of the text."""
    log_every: int = 25
    """Steps between lines of the log."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints that are kept."""
    progress: bool = True
    """Whether a progress bar is shown."""

    def __post_init__(self) -> None:
        if (self.n_tokens is None) == (self.steps is None):
            both = "neither" if self.steps is None else "both"
            raise OptionError(f"give n_tokens= or steps=, one of them; got {both}")
        for name in ("n_tokens", "steps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, whole=True)
        for name in ("log_every", "checkpoint_every", "keep"):
            check_number(name, getattr(self, name), 1, whole=True)
        check_number("seed", self.seed, 0, whole=True)
        for name in ("warmup", "decay", "beta1", "beta2"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("lr", "reconstruction"):
            check_number(name, getattr(self, name), 0)
        if self.grad_clip is not None:
            check_number("grad_clip", self.grad_clip, 0)
        check_choice("progress", self.progress, (True, False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """From a plain mapping; an unknown key is an error that names the nearest option."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, fit for JSON."""
        return dataclasses.asdict(self)

    def same_run(self) -> dict[str, Any]:
        """The options that the weights depend on: what a resumed run must share."""
        free = ("log_every", "checkpoint_every", "keep", "progress")
        return {name: value for name, value in self.to_dict().items() if name not in free}

    def n_steps(self, tokens_a_step: int) -> int:
        """Steps in all, at this many positions a step."""
        if self.steps is not None:
            return self.steps
        assert self.n_tokens is not None
        return math.ceil(self.n_tokens / tokens_a_step)

    def lr_factor(self, step: int, n_steps: int) -> float:
        """The learning rate's factor at a step: linear warm-up, plateau, linear decay."""
        rise, fall = self.warmup * n_steps, self.decay * n_steps
        up = (step + 1) / rise if rise > 0 else 1.0
        down = (n_steps - step) / fall if fall > 0 else 1.0
        return min(1.0, up, down)
