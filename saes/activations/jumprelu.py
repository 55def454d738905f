"""JumpReLU: pre-activations above a learned threshold each (Rajamanoharan et al. 2024, arXiv:2407.14435).

    z = pre H(pre - theta),        penalty = sum H(pre - theta)       (the number of active latents)

H is a step, so theta has no gradient of its own. The paper's straight-through estimate smooths it with a kernel K, here
the rectangle of width 1, over a bandwidth eps:

    dz / dtheta = -theta / eps K((pre - theta) / eps),      dH / dtheta = -1 / eps K((pre - theta) / eps)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saes.activations.base import At, Bounded, Latents
from saes.loss_state import LossState
from saes.parameters import CoderParameters


def _window(pre: Tensor, theta: Tensor, eps: float) -> Tensor:
    """K((pre - theta) / eps) / eps."""
    return ((pre - theta).abs() < eps / 2).to(pre.dtype) / eps


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.eps = eps
        return torch.where(pre > theta, pre, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor):
        pre, theta = ctx.saved_tensors
        d_theta = -theta * _window(pre, theta, ctx.eps) * dz
        return torch.where(pre > theta, dz, 0.0), d_theta.sum_to_size(theta.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.eps = eps
        return (pre > theta).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor):
        pre, theta = ctx.saved_tensors
        return None, (-_window(pre, theta, ctx.eps) * dz).sum_to_size(theta.shape), None


def jump(pre: Float[Tensor, "..."], theta: Float[Tensor, "..."], eps: float) -> Float[Tensor, "..."]:
    """pre where it is above theta, else 0."""
    return _Jump.apply(pre, theta, eps)


def step(pre: Float[Tensor, "..."], theta: Float[Tensor, "..."], eps: float) -> Float[Tensor, "..."]:
    """1 where pre is above theta, else 0."""
    return _Step.apply(pre, theta, eps)


class JumpReLU(Bounded):
    """Thresholds are clamped at 0 after each step (:func:`saes.init.after_step`)."""

    def setup(self, coder: CoderParameters) -> None:
        """A threshold per latent."""
        super().setup(coder)
        coder.threshold = nn.Parameter(torch.full((coder.cfg.d_sae,), 0.1))

    def infer(self, coder: CoderParameters, pre: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """Dense latents."""
        return torch.where(pre > coder.threshold, pre, 0.0).relu()

    def bound(self, coder: CoderParameters, state: LossState) -> Float[Tensor, " F"]:
        """The threshold's gradient vanishes from half a bandwidth below it."""
        return coder.threshold - state.bandwidth / 2

    def latents(self, coder: CoderParameters, pre: Float[Tensor, "..."], at: At, state: LossState) -> Latents:
        """Values and their number, both with gradients to the threshold."""
        theta = coder.threshold[at]
        values = jump(pre, theta, state.bandwidth)
        return Latents(values, None, 0, penalty=step(pre, theta, state.bandwidth).sum())
