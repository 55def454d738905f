"""States packed for kernels whose lanes are sixteen rows: E x N as V x N x 16, V = E / 16."""

from __future__ import annotations

from typing import no_type_check

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_mamba.ops.numba_lanes import LANES, transpose


def pack_states(t: Tensor, E: int) -> Tensor:
    """[...] E N as [...] V N 16, a copy."""
    missing = -t.shape[-2] % LANES
    t = F.pad(t, (0, 0, 0, missing)) if missing else t
    return t.unflatten(-2, (-1, LANES)).transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def unpack_states(t: Tensor, E: int) -> Tensor:
    """[...] V N 16 as [...] E N, without the padding of E."""
    return t.transpose(-1, -2).flatten(-3, -2)[..., :E, :].contiguous()


@numba.njit
@no_type_check
def unpack(packed, k, out, at, N, lanes):
    """Copy the packed N x 16 at k to lanes x N at `at`."""
    whole = N - N % LANES if lanes == LANES else 0
    for n in range(0, whole, LANES):
        transpose(packed, k + n * LANES, LANES, out, at + n, N)
    for e in range(lanes):
        for n in range(whole, N):
            out[at + e * N + n] = packed[k + n * LANES + e]


@numba.njit
@no_type_check
def add_packed(values, at, N, lanes, packed, k, scratch):
    """Add lanes x N values at `at` to the packed N x 16 at k."""
    whole = N - N % LANES if lanes == LANES else 0
    for n in range(0, whole, LANES):
        transpose(values, at + n, N, scratch, n * LANES, LANES)
    for e in range(lanes):
        for n in range(whole, N):
            scratch[n * LANES + e] = values[at + e * N + n]
    for n in range(N):
        for e in range(lanes):
            packed[k + n * LANES + e] += scratch[n * LANES + e]
