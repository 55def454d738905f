"""Which positions and tokens of the logits a metric reads, so that the others need not be computed.

Computing the logits of all positions is often the most expensive part of a patch: V d products per position, as much as
ten layers at 130m shape. The metric's gradient with respect to the logits shows which positions it reads, and of which
tokens; its value must not change when all others hold NaN, infinities or random numbers. If one of these checks fails,
as for a metric without a gradient, all positions, or all tokens, count as read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
"""From logits b l V to one number, or to one per row."""

FEW = 0.25
"""Share of the vocabulary up to which the logits of single tokens are formed."""


def read_positions(metric: Metric, logits: Float[Tensor, "b l V"]) -> list[int]:
    """The columns of `logits` that a metric depends on; all of them if that cannot be determined.

    The metric is called a few times, with meaningless numbers in the columns that it seems not to read.
    """
    found = _gradient(metric, logits)
    columns = [] if found is None else found.abs().sum((0, 2)).nonzero().flatten().tolist()
    every = list(range(logits.shape[1]))
    if not columns or len(columns) == len(every):
        return every
    here = torch.zeros(logits.shape[1:], dtype=torch.bool, device=logits.device)
    here[columns] = True
    return columns if _reads_no_more(metric, logits, here) else every


def read_tokens(metric: Metric, logits: Float[Tensor, "b l V"], columns: Sequence[int]) -> list[int] | None:
    """The tokens whose logits a metric depends on, in columns that it reads; None: too many to be worth it, or unknown.

    Called and checked as for :func:`read_positions`, with nothing changed in other columns.
    """
    found = _gradient(metric, logits)
    tokens = [] if found is None else found[:, columns].abs().sum((0, 1)).nonzero().flatten().tolist()
    if not 0 < len(tokens) <= FEW * logits.shape[2]:
        return None
    here = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device)
    here[columns] = False
    here[_grid(columns, tokens)] = True
    return tokens if _reads_no_more(metric, logits, here) else None


def _gradient(metric: Metric, logits: Float[Tensor, "b l V"]) -> Float[Tensor, "b l V"] | None:
    """Of the metric's sum; None where it has none: it leaves torch, compares, or counts."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of metrics that leave it, which are taken care of
        leaf = logits.detach().clone().requires_grad_()
        try:
            value = torch.as_tensor(metric(leaf))
            return torch.autograd.grad(value.sum(), [leaf], allow_unused=True)[0]
        except (RuntimeError, TypeError):
            return None


def _reads_no_more(metric: Metric, logits: Float[Tensor, "b l V"], here: Bool[Tensor, "l V"]) -> bool:
    """Whether the metric stays the same when every logit that is not `here` holds another number."""
    expected = torch.as_tensor(metric(logits.clone())).detach()
    for others in _other_numbers(logits):
        got = torch.as_tensor(metric(torch.where(here, logits, others))).detach()
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-6, equal_nan=True):
            return False
    return True


def _grid(columns: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Index of these tokens in each of these columns."""
    return torch.tensor(columns)[:, None], torch.tensor(tokens)


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
    all_tokens
        Whether the logits of all tokens are formed there, as functions on their hook points need them.
    """

    def __init__(
        self,
        model: Any,
        metric: Metric,
        base: Float[Tensor, "b l V"],
        positions: list[int] | None = None,
        all_tokens: bool = False,
    ) -> None:
        self.to_logits: Callable[..., Tensor] = model.to_logits
        self.metric, self.base = metric, base
        self.positions = read_positions(metric, base) if positions is None else positions
        self._filled = torch.full_like(base, torch.nan)
        """Logits as the metric gets them: nothing where it does not read."""
        self._filled[:, self.positions] = base[:, self.positions]
        self.tokens = None if all_tokens else read_tokens(metric, self._filled, self.positions)
        """Tokens whose logits it reads; None: all."""
        if self.tokens is not None:
            self._filled.fill_(torch.nan)

    def __call__(self, resid: Float[Tensor, "n m d"], first: int) -> list[Tensor]:
        """The metric of each copy of the prompts whose columns from `first` on differ.

        Parameters
        ----------
        resid
            The last columns of the last block's output: those that are read, and any number before them.
        """
        (b, length), later = self.base.shape[:2], self.later(first)
        logits = self.to_logits(resid[:, [t - length for t in later]], self.tokens) if later else resid[:, :0]
        return [self._value(part, later) for part in logits.split(b)]

    def later(self, first: int) -> list[int]:
        """The columns that it reads from `first` on."""
        return [t for t in self.positions if t >= first]

    def _value(self, logits: Float[Tensor, "b r v"], later: list[int]) -> Tensor:
        read, new = self._at(self.positions), self._at(later)
        self._filled[read] = self.base[read]
        if later:
            self._filled[new] = logits.to(self._filled)
        return torch.as_tensor(self.metric(self._filled))

    def _at(self, columns: list[int]) -> tuple[slice | Tensor | list[int], ...]:
        """Where in the logits the metric reads in these columns."""
        return (slice(None), columns) if self.tokens is None else (slice(None), *_grid(columns, self.tokens))
