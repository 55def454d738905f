"""Which weights stay float32 in a half-precision model, and how random ones are drawn."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mamba.config import SSMConfig


class KeepsFloat32:
    """A module whose `keep_float32` parameters never become half precision: A, D and dt's bias decide the states.

    (A_log rounded to bfloat16 moves the logits of a tiny model by 1.6e-3.)
    """

    keep_float32: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        kept = {name: self.get_parameter(name).detach().clone() for name in self.keep_float32}  # type: ignore[attr-defined]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, before in kept.items():
            parameter: nn.Parameter = self.get_parameter(name)  # type: ignore[attr-defined]
            if parameter.dtype in (torch.bfloat16, torch.float16):
                grad, parameter.grad = parameter.grad, None
                parameter.data = before.to(device=parameter.device, dtype=torch.float32)
                parameter.grad = None if grad is None else grad.float()
        return self


def initial_dt_bias(
    cfg: SSMConfig, like: Float[Tensor, " c"], generator: torch.Generator | None = None
) -> Float[Tensor, " c"]:
    """Biases whose softplus is log-uniform between dt_min and dt_max, clamped from below by dt_init_floor."""
    u = torch.empty(like.shape, dtype=torch.float64, device=like.device).uniform_(generator=generator)
    dt = torch.exp(u * (math.log(cfg.dt_max) - math.log(cfg.dt_min)) + math.log(cfg.dt_min))
    dt = dt.clamp(min=cfg.dt_init_floor)
    return (dt + torch.log(-torch.expm1(-dt))).to(like.dtype)  # softplus' inverse


def uniform_fan_in(weight: Tensor, fan_in: int, generator: torch.Generator | None = None) -> None:
    """Fill with U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's own default for linear and convolution layers."""
    bound = 1 / math.sqrt(fan_in)
    weight.uniform_(-bound, bound, generator=generator)
