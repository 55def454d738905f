"""The interface of an architecture: which latents of a batch are kept, and their values.

In training, a batch is encoded in three steps:
    1. the pre-activations x W_enc + b, a run of rows at a time, without gradient: the only dense product;
    2. the k largest entries, or those above a bound, are kept and all others dropped;
    3. the kept entries get their gradients back (:func:`saes.sparse.encode`) and become latents.
Where too many are kept, the pre-activations stay dense and autograd does the rest. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mamba.ops.products import linear
from saes import sparse
from saes.loss_state import LossState
from saes.parameters import CoderParameters
from saes.sparse import Pattern

CHUNK = 1 << 23
"""Pre-activations at a time on a CPU: about what its last-level cache holds."""

CHUNK_CUDA = 1 << 28
"""The same on a GPU, where it bounds memory."""

DENSE = 1 / 16
"""Share of kept entries from which dense products are faster."""

At = Int[Tensor, " n"] | slice
"""Which latent each entry belongs to: an index per entry, or all of them along the last axis."""


@dataclass
class Latents:
    """The latents of a batch in training: `values` at the entries of `pattern`, or, without pattern, of all."""

    values: Float[Tensor, "..."]
    pattern: Pattern | None
    rows: int
    penalty: Float[Tensor, ""] | None = None
    """The architecture's sparsity penalty per example, before its coefficient."""
    gate: Float[Tensor, "..."] | None = None
    """The gated coder's rectified gate, which must also reconstruct on its own."""
    least: Float[Tensor, ""] | None = None
    """The smallest active value, which the threshold for inference follows."""
    rest: Latents | None = None
    """As many again, the next largest, where the wide reconstruction is wanted."""

    def fired(self, F: int) -> Tensor:
        """Which latents are active anywhere in the batch, bool [F]."""
        if self.pattern is None:
            return (self.values != 0).any(0)
        active = self.pattern.indices[self.values != 0]
        return torch.zeros(F, dtype=torch.bool, device=active.device).index_fill_(0, active, True)

    def l0(self) -> Float[Tensor, ""]:
        """Active latents per example."""
        return (self.values != 0).sum() / self.rows

    def decode(self, W: Float[Tensor, "F d"], values: Tensor | None = None) -> Float[Tensor, "n d"]:
        """The sum of active rows of W; of other `values` at the same entries, if given."""
        values = self.values if values is None else values
        return values @ W if self.pattern is None else sparse.decode(values, self.pattern, W)


def affine(x: Float[Tensor, "n d"], W: Float[Tensor, "d F"], b: Float[Tensor, " F"]) -> Float[Tensor, "n F"]:
    """x W + b."""
    return linear(x.unsqueeze(0), W.t(), b).squeeze(0)


def runs(x: Float[Tensor, "n d"], F: int) -> Iterator[Tensor]:
    """Rows of x in chunks whose pre-activations fit in memory."""
    return iter(x.split(max(1, (CHUNK_CUDA if x.is_cuda else CHUNK) // F)))


class Activation:
    """One architecture. Each that is trained has its own file in this folder."""

    def setup(self, coder: CoderParameters) -> None:
        """Give the coder the parameters and buffers that depend on the architecture."""
        coder.b_enc = nn.Parameter(torch.zeros(coder.cfg.d_sae))

    def bias(self, coder: CoderParameters) -> Float[Tensor, " F"]:
        """The bias of the pre-activations."""
        return coder.b_enc

    def infer(self, coder: CoderParameters, pre: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
        """Latents from pre-activations, as at inference."""
        raise TypeError(f"{type(self).__name__} does not implement infer")

    def train(self, coder: CoderParameters, x: Float[Tensor, "n d"], state: LossState) -> Latents:
        """Latents in training; x is centred and scaled already."""
        raise TypeError(f"{type(self).__name__} does not implement train")

    def with_gradient(self, coder: CoderParameters, x: Tensor, pattern: Pattern, pre: Tensor) -> Float[Tensor, " n"]:
        """Attach gradients to pre-activations that were computed without."""
        return sparse.encode(x, coder.W_enc, self.bias(coder), pre, pattern)


class Bounded(Activation):
    """Entries above a bound are kept: JumpReLU, standard, gated."""

    def bound(self, coder: CoderParameters, state: LossState) -> Float[Tensor, " F"] | float:
        """Pre-activations up to this bound contribute neither value nor gradient."""
        return 0.0

    def latents(self, coder: CoderParameters, pre: Float[Tensor, "..."], at: At, state: LossState) -> Latents:
        """Values, penalty and gate of entries; `pattern` and `rows` are filled in by :meth:`train`."""
        raise TypeError(f"{type(self).__name__} does not implement latents")

    def train(self, coder: CoderParameters, x: Float[Tensor, "n d"], state: LossState) -> Latents:
        """Sparse where few entries are kept, dense otherwise."""
        pattern, pre = self._entries(coder, x, state)
        out = self.latents(coder, pre, slice(None) if pattern is None else pattern.indices, state)
        out.pattern, out.rows = pattern, len(x)
        if out.penalty is not None:
            out.penalty = out.penalty / len(x)
        return out

    def _entries(self, coder: CoderParameters, x: Tensor, state: LossState) -> tuple[Pattern | None, Tensor]:
        F = coder.cfg.d_sae
        found, done, count = [], 0, 0
        with torch.no_grad():
            bound = self.bound(coder, state)
            for run in runs(x, F):
                pre = affine(run, coder.W_enc, self.bias(coder))
                rows, indices = (pre > bound).nonzero(as_tuple=True)
                found.append((rows + done, indices, pre[rows, indices]))
                done, count = done + len(run), count + len(rows)
                if count > DENSE * done * F:
                    break
        if count > DENSE * done * F:
            return None, affine(x, coder.W_enc, self.bias(coder))
        rows, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        pattern = Pattern.of_rows(rows, indices, len(x), F)
        return pattern, self.with_gradient(coder, x, pattern, values)
