"""The parts that both families share: norms, the causal convolution, embedding and unembedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mamba.documents import Documents, restarted
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.hooks.site import Site
from hooked_mamba.hooks.sited import SitedModule
from hooked_mamba.layers import plain, what_is_on
from hooked_mamba.ops import causal_conv1d as causal_conv1d
from hooked_mamba.ops import silu as silu
from hooked_mamba.ops import softplus as softplus
from hooked_mamba.ops.products import linear as linear
from hooked_mamba.ops.products import root_mean_square, squares


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(SitedModule):
    """x / sqrt(mean x^2 + eps) * weight over the last axis.

    Zhang & Sennrich 2019, arXiv:1910.07467.

    hook_scale is the divisor, hook_normalized the quotient, hook_out the product with the weight.
    """

    sites = (
        Site("hook_scale", "b l 1", "the divisor sqrt(mean x^2 + eps)", wide=True),
        Site("hook_normalized", "b l w", "x / scale, before the weight", wide=True),
        Site("hook_out", "b l w", "after the weight"),
    )

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"w": self.weight.shape[0]}

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x = at_least_fp32(x)
        scale = self.hook_scale(root_mean_square(x, self.eps))
        normalized = self.hook_normalized(x / scale)
        return self.hook_out((normalized * self.weight).to(self.weight.dtype))


class LayerNorm(SitedModule):
    """(x - mean x) / sqrt(var x + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450).

    hook_scale is the divisor, hook_normalized the quotient, hook_out the result after weight and bias.
    """

    sites = (
        Site("hook_scale", "b l 1", "the divisor sqrt(var x + eps)", wide=True),
        Site("hook_normalized", "b l w", "(x - mean x) / scale, before weight and bias", wide=True),
        Site("hook_out", "b l w", "after weight and bias"),
    )

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"w": self.weight.shape[0]}

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x = at_least_fp32(x)
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((squares(x).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(x / scale)
        return self.hook_out((normalized * self.weight + self.bias).to(self.weight.dtype))


class HeadNorm(SitedModule):
    """LayerNorm of each head by itself, with a weight and a bias for every channel (GroupNorm with H groups)."""

    sites = (
        Site("hook_scale", "b l H 1", "the divisor sqrt(var y + eps) of each head", wide=True),
        Site("hook_normalized", "b l H V", "(y - mean y) / scale of each head", wide=True),
        Site("hook_out", "b l H V", "after weight and bias"),
    )

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(heads * width))
        self.bias = nn.Parameter(torch.zeros(heads * width))
        self.add_sites()

    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "V": self.weight.shape[0] // self.heads}

    def forward(self, y: Float[Tensor, "b l H V"]) -> Float[Tensor, "b l H V"]:
        y = at_least_fp32(y)
        y = y - y.mean(-1, keepdim=True)
        scale = self.hook_scale((y.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(y / scale)
        weight, bias = (p.unflatten(0, (self.heads, -1)) for p in (self.weight, self.bias))
        return self.hook_out((normalized * weight + bias).to(self.weight.dtype))


class GroupedRMSNorm(RMSNorm):
    """The same over each of `groups` equal parts of the last axis: the gated norm of Mamba-2."""

    sites = (
        Site("hook_scale", "b l G 1", "the divisor, per group", wide=True),
        *RMSNorm.sites[1:],
    )

    def __init__(self, width: int, eps: float, groups: int) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "G": self.groups}

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x = at_least_fp32(x).unflatten(-1, (self.groups, -1))
        scale = self.hook_scale((squares(x).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized((x / scale).flatten(2))
        return self.hook_out((normalized * self.weight).to(self.weight.dtype))


def rms_normalize(x: Float[Tensor, "... n"], eps: float) -> Float[Tensor, "... n"]:
    """RMS norm without weight, computed in float32 at least (Falcon-Mamba's norm of dt, B and C)."""
    wide = at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def conv_silu(
    x: Float[Tensor, "b l c"],
    history: Float[Tensor, "b h c"] | None,
    conv: nn.Conv1d,
    hook: HookPoint,
    documents: Documents | None = None,
) -> Float[Tensor, "b m c"]:
    """SiLU of the causal convolution, whose own output is computed only if `hook` is in use."""
    if hook.wanted or what_is_on(conv) is not None:
        return silu(hook(convolved(x, conv, history, documents)))

    def run(x: Tensor, history: Tensor | None) -> Tensor:
        return causal_conv1d(x, conv.weight, conv.bias, history=history, silu=True)

    return restarted(documents, conv.weight.shape[-1] - 1, run, x, history)


def convolved(
    x: Float[Tensor, "b l c"],
    conv: nn.Conv1d,
    history: Float[Tensor, "b h c"] | None,
    documents: Documents | None = None,
) -> Float[Tensor, "b m c"]:
    """The causal convolution; the layer itself is called if it has an adapter or a torch hook."""

    def run(x: Tensor, history: Tensor | None) -> Tensor:
        if what_is_on(conv) is None:
            return causal_conv1d(x, conv.weight, conv.bias, history=history)
        x = x if history is None else torch.cat([history.to(x.dtype), x], 1)
        return conv(x.transpose(1, 2)).transpose(1, 2)

    return restarted(documents, conv.kernel_size[0] - 1, run, x, history)


@plain
class Linear(nn.Linear):
    """torch's linear layer through :func:`linear`."""

    def forward(self, input: Float[Tensor, "b l i"]) -> Float[Tensor, "b l o"]:
        return linear(input, self.weight, self.bias)


class LowRank(nn.Module):
    """W_b W_a x: what an adapter adds to a linear layer (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, width_in: int, rank: int, width_out: int) -> None:
        super().__init__()
        self.a = Linear(width_in, rank, bias=False)
        self.b = Linear(rank, width_out, bias=False)

    def forward(self, x: Float[Tensor, "b l i"]) -> Float[Tensor, "b l o"]:
        return self.b(self.a(x))


@plain
class Embed(nn.Module):
    """Rows of the embedding matrix."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_vocab, d_model))

    @property
    def W_E(self) -> Float[Tensor, "V d"]:
        """The weight under TransformerLens' name."""
        return self.weight

    def forward(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return F.embedding(tokens, self.weight)


@plain
class Unembed(nn.Module):
    """Logits, float32 at least; the weight is [V, d] as stored, and shared with the embedding if they are tied."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_vocab, d_model))

    @property
    def W_U(self) -> Float[Tensor, "d V"]:
        """The weight in TransformerLens' form."""
        return self.weight.t()

    def forward(self, x: Float[Tensor, "b l d"], tokens: Sequence[int] | None = None) -> Float[Tensor, "b l v"]:
        """Of all tokens, or of some."""
        return at_least_fp32(linear(x, self.weight if tokens is None else self.weight[list(tokens)]))
