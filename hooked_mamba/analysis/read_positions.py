"""Which positions of the logits a metric reads, so that the others need not be computed.

Computing the logits of all positions is often the most expensive part of a patch: V d products per position, as much as
ten layers at 130m shape. The metric's gradient with respect to the logits shows which positions it reads, and its value
must not change when all others hold NaN, infinities or random numbers. If one of these checks fails, as for a metric
without a gradient, all positions count as read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
"""From logits b l V to one number, or to one per row."""


def read_positions(metric: Metric, logits: Float[Tensor, "b l V"]) -> list[int]:
    """The columns of `logits` that a metric depends on; all of them if that cannot be determined.

    The metric is called a few times, with meaningless numbers in the columns that it seems not to read.
    """
    every = list(range(logits.shape[1]))
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of metrics that leave it, which are taken care of
        leaf = logits.detach().clone().requires_grad_()
        try:
            value = torch.as_tensor(metric(leaf))
            (gradient,) = torch.autograd.grad(value.sum(), [leaf], allow_unused=True)
        except (RuntimeError, TypeError):  # it has no gradient: it leaves torch, compares, or counts
            return every
    if gradient is None:
        return every
    found = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
    if not found or len(found) == len(every):
        return every
    expected = torch.as_tensor(metric(logits.clone())).detach()
    for others in _other_numbers(logits):
        others[:, found] = logits[:, found]
        got = torch.as_tensor(metric(others)).detach()
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-6, equal_nan=True):
            return every
    return found


def _other_numbers(logits: Tensor) -> Iterator[Tensor]:
    for number in (torch.nan, torch.inf, -torch.inf):
        yield torch.full_like(logits, number)
    generator = torch.Generator(logits.device).manual_seed(0)
    for _ in range(2):
        yield 100 * torch.randn(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)


class Readout:
    """A metric on logits that are computed only where it reads them.

    Parameters
    ----------
    model
        Its final norm and unembedding are used.
    metric
        From logits b l V to one number, or to one per row.
    base
        Logits of the run that patches change.
    positions
        Columns that the metric reads; None: found automatically.
    """

    def __init__(
        self, model: object, metric: Metric, base: Float[Tensor, "b l V"], positions: list[int] | None = None
    ) -> None:
        self.to_logits: Callable[[Tensor], Tensor] = model.to_logits  # type: ignore[attr-defined]
        self.metric, self.base = metric, base
        self.positions = read_positions(metric, base) if positions is None else positions
        self._filled = torch.full_like(base, torch.nan)
        """Logits as the metric gets them: nothing where it does not read."""

    def __call__(self, resid: Float[Tensor, "n m d"], first: int) -> list[Tensor]:
        """The metric of each copy of the prompts, from its last block's output from column `first` on."""
        b = self.base.shape[0]
        later = [t for t in self.positions if t >= first]
        logits = self.to_logits(resid[:, [t - first for t in later]]) if later else resid.new_zeros(len(resid), 0, 1)
        return [self._value(part, later) for part in logits.split(b)]

    def _value(self, logits: Float[Tensor, "b r V"], later: list[int]) -> Tensor:
        filled = self._filled
        filled[:, self.positions] = self.base[:, self.positions]
        if later:
            filled[:, later] = logits
        return torch.as_tensor(self.metric(filled))
