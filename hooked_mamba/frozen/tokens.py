"""How tokens reach a scan: the split of u_s into the tokens s-K+1..s through a convolution's taps.

    u_s = sigma_s xc_s        xc_s = sum_k kappa[K-1-k] p_{s-k} + b_c        sigma = sigmoid(xc), taken as it was

so token s sends sum_k alpha[t,s+k] sigma_{s+k} kappa[K-1-k] p_s to target t. Without a convolution u = p: one tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.linear import causal_mix
from hooked_mamba.layers import weights_of

Source = Literal["scan", "token"]
"""What a source position s is: the term alpha[t,s] u_s of the scan, or the token s through all taps of the
convolution. They differ, since u_s already mixes the tokens s-K+1..s."""


@dataclass(frozen=True)
class TokenPath:
    """The way of each channel from its own input p to the value u that enters memory, linearised at a run."""

    p: Float[Tensor, "b l E"]
    """Inputs of the convolution (those channels that become u)."""
    sigma: Float[Tensor, "b l E"]
    """SiLU's factor; 0 at padding."""
    taps: Float[Tensor, "E K"]
    """kappa; the last tap multiplies the position itself."""
    bias: Float[Tensor, " E"]
    """b_c."""

    @classmethod
    def silu(cls, conv: nn.Conv1d, p: Tensor, out: Tensor, u: Tensor) -> TokenPath:
        """SiLU of a convolution, from the run's inputs and outputs of the convolution, and u (any layout)."""
        E = u.flatten(2).shape[-1]
        weight, bias = weights_of(conv, "conv1d")
        bias = None if bias is None else bias[:E]
        return cls.gated(weight[:E, 0], bias, p[..., :E], out[..., :E], u)

    @classmethod
    def gated(cls, taps: Tensor, bias: Tensor | None, p: Tensor, out: Tensor, u: Tensor) -> TokenPath:
        """The same from the taps E K and the bias of just the channels that become u."""
        p, out, u = at_least_fp32(p), at_least_fp32(out), u.flatten(2)
        # At padding u is 0 whatever the convolution says.
        sigma = torch.where((u == 0) & (out != 0), torch.zeros_like(out), torch.sigmoid(out))
        return cls(p, sigma, at_least_fp32(taps), at_least_fp32(taps.new_zeros(len(taps)) if bias is None else bias))

    @classmethod
    def straight(cls, u: Tensor) -> TokenPath:
        """No convolution: p is u."""
        u = at_least_fp32(u.flatten(2))
        return cls.scaled(u, torch.ones_like(u))

    @classmethod
    def scaled(cls, p: Float[Tensor, "b l E"], factor: Float[Tensor, "b l E"]) -> TokenPath:
        """No convolution: u is p times a held factor."""
        return cls(p, factor, p.new_ones(p.shape[-1], 1), p.new_zeros(p.shape[-1]))

    def input_of(self, tokens: Bool[Tensor, "b l"]) -> Float[Tensor, "b l E"]:
        """The part of u that comes from chosen tokens, biases of the convolution left out."""
        return self.sigma * self.mix(self.p * tokens.unsqueeze(-1))

    def mix(self, p: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
        """sum_k kappa[K-1-k] p_{t-k} of any inputs, with nothing before the first."""
        return causal_mix(self.taps, p)

    def split_tokens(
        self, alpha: Float[Tensor, "b q s h 1"], channels: slice, P: int
    ) -> tuple[Float[Tensor, "b q s h p"], Float[Tensor, "b q h p"]]:
        """What y_t gets from each token, and from the convolution's bias, for the lanes of `channels`."""
        K, l = self.taps.shape[1], alpha.shape[2]
        sigma, p = (rearrange(v[..., channels], "b s (h p) -> b 1 s h p", p=P) for v in (self.sigma, self.p))
        taps = rearrange(self.taps[channels], "(h p) k -> k h p", p=P)
        bias = rearrange(self.bias[channels], "(h p) -> h p", p=P)
        reach = alpha * sigma
        through = torch.zeros_like(reach)
        for k in range(min(K, l)):
            through[:, :, : l - k] += taps[K - 1 - k] * reach[:, :, k:]
        return through * p, (reach * bias).sum(2)


@dataclass(frozen=True)
class ShiftedPath(TokenPath):
    """RWKV's way, whose two taps are on what the weights read: p_t = own_t + earlier_t, of the tokens t and t - 1.

    u_t = sigma_t p_t + first_t, in which first is the share of the first layer's value; it counts as of its position.
    """

    earlier: Float[Tensor, "b l E"]
    """The part of p that the token before gives."""
    first: Float[Tensor, "b l E"]
    """The part of u that the first layer's value gives; 0 in the first layer."""

    def mix(self, p: Float[Tensor, "n l E"]) -> Float[Tensor, "n l E"]:
        """Not defined.

        Raises
        ------
        ValueError
            A channel's input is already made of two tokens.
        """
        raise ValueError(
            "here a value's input mixes two tokens before any channel does: use source='scan', whose sources are"
            " the positions at which values enter the state"
        )

    def split_tokens(
        self, alpha: Float[Tensor, "b q s h 1"], channels: slice, P: int
    ) -> tuple[Float[Tensor, "b q s h p"], Float[Tensor, "b q h p"]]:
        own, earlier, sigma, first = (
            rearrange(v[..., channels], "b s (h p) -> b 1 s h p", p=P)
            for v in (self.p - self.earlier, self.earlier, self.sigma, self.first)
        )
        sent = alpha * (sigma * own + first)
        sent[:, :, :-1] += (alpha * sigma * earlier)[:, :, 1:]
        before = (alpha * sigma * earlier)[:, :, 0]  # of a token before this call
        return sent, torch.zeros_like(before)
