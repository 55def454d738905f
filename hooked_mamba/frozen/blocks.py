"""All pairs (target, earlier source) of a scan whose decay is exp(A dt), in blocks that are matrix products.

For a position m between s and t the product of decays splits into exp(A (cs_t - cs_m)) and exp(A (cs_m - cs_s)), cs the
running sum of dt. Both are at most 1, so nothing overflows, and a whole block (targets after m) x (sources up to m) is
one matrix product over N. Halving the sequence repeatedly covers all pairs s < t with l log2(l) exponentials per state
instead of l^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PairBlock:
    """A block of targets after `middle` and sources up to it."""

    rows: slice
    """Places in the ascending list of targets."""
    sources: slice
    middle: int
    """The last source; the decay is split behind it."""


def blocks_of(ascending: Sequence[int], length: int) -> Iterator[PairBlock]:
    """Blocks that cover every pair (target, earlier source) once: halve, take the off-diagonal half, continue."""
    todo = [(0, length, 0, len(ascending))]
    while todo:
        start, stop, first, last = todo.pop()
        if stop - start < 2 or first == last:
            continue
        half = (start + stop + 1) // 2
        cut = first
        while cut < last and ascending[cut] < half:
            cut += 1
        if cut < last:
            yield PairBlock(slice(cut, last), slice(start, half), half - 1)
        todo += [(start, half, first, cut), (half, stop, cut, last)]


def block_factors(
    dt: Float[Tensor, "b l H"],
    A: Float[Tensor, "H N_or_1"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    block: PairBlock,
    ascending: Sequence[int],
    include_dt: bool,
) -> tuple[Float[Tensor, "b q H N"], Float[Tensor, "b s H N"]]:
    """C exp(A (cs_t - cs_m)) of the targets, and B_bar exp(A (cs_m - cs_s)) of the sources."""
    start, stop = block.sources.start, block.sources.stop
    last = ascending[block.rows.stop - 1]
    # Running sums in float64: exponents are differences of numbers that grow with the length.
    steps = dt[:, start : last + 1].double().cumsum(1)
    middle = steps[:, stop - 1 - start, None]
    at = torch.tensor(ascending[block.rows], dtype=torch.long, device=dt.device)
    since = (steps[:, at - start] - middle).to(dt.dtype)
    until = (middle - steps[:, : stop - start]).to(dt.dtype)
    H = dt.shape[2]
    left = torch.exp(since.unsqueeze(-1) * A) * of_lanes(C[:, at], H, dt.dtype)
    right = torch.exp(until.unsqueeze(-1) * A) * of_lanes(B[:, start:stop], H, dt.dtype)
    if include_dt:
        right = right * dt[:, start:stop].unsqueeze(-1)
    return left, right


def of_lanes(v: Float[Tensor, "b l G N"], lanes: int, dtype: torch.dtype) -> Float[Tensor, "b l H_or_1 N"]:
    """Groups as lanes (or one where all lanes share it), in the dtype of dt."""
    G = v.shape[2]
    v = v.to(dtype)
    return v if G in (1, lanes) else v.repeat_interleave(lanes // G, 2)
