"""Areas under curves, bootstrap intervals, and where the middle 95% of some controls lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Interval = dict[str, float]
"""`value`, `low` and `high`, as results keep it."""


def auc(positive: Float[Tensor, "n ..."], negative: Float[Tensor, "m ..."]) -> Float[Tensor, "..."]:
    """How often a positive is above a negative; ties count half."""
    above = (positive[:, None] > negative[None]).double() + (positive[:, None] == negative[None]).double() / 2
    return above.mean((0, 1))


def interval(values: Float[Tensor, " n"], share: float = 0.95) -> tuple[float, float]:
    """Quantiles between which the middle `share` of values lies."""
    ends = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.double)
    low, high = torch.quantile(values.double(), ends).tolist()
    return low, high


def resampled(n: int, times: int, seed: int) -> Int[Tensor, "times n"]:
    """Which of n examples each bootstrap sample holds."""
    return torch.randint(n, (times, n), generator=torch.Generator().manual_seed(seed))


def bootstrap(statistic: Callable[[Tensor], Any], n: int, times: int, seed: int) -> Interval:
    """A statistic of all of n examples, with its percentile interval.

    Parameters
    ----------
    statistic
        From indices of examples to a number.
    """
    values = torch.tensor([float(statistic(chosen)) for chosen in resampled(n, times, seed)])
    low, high = interval(values)
    return {"value": float(statistic(torch.arange(n))), "low": low, "high": high}


def mean_interval(values: Float[Tensor, " n"], times: int, seed: int) -> Interval:
    """The mean with its percentile interval."""
    values = values.double()
    means = values[resampled(len(values), times, seed)].mean(1)
    low, high = interval(means)
    return {"value": float(values.mean()), "low": low, "high": high}


def beside(value: float, controls: Float[Tensor, " n"]) -> dict[str, float]:
    """A value, the middle 95% of its controls, and how many of them reach it."""
    low, high = interval(controls)
    reach = int((controls.double() >= value).sum())
    return {"value": value, "low": low, "high": high, "reach": reach, "controls": len(controls)}
