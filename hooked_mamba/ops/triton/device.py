"""Small functions that the kernels share; each runs inside a kernel.

A block is a run of at most T positions that is unrolled. Without a table the blocks are T positions long; a table
(int32, a row per block) holds their first position, their length, and the index of the edit and of the saved state
at their first position, -1 for none.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_bounds(TABLE, block, L, T: tl.constexpr):
    """First position and number of positions of a block."""
    if TABLE is not None:
        begin = tl.load(TABLE + block * 4)
        steps = tl.load(TABLE + block * 4 + 1)
    else:
        begin = block * T
        steps = tl.minimum(L - begin, T)
    return begin, steps


@triton.jit
def block_event(TABLE, block):
    """Index of the edit and of the saved state at the first position of a block."""
    return tl.load(TABLE + block * 4 + 2), tl.load(TABLE + block * 4 + 3)


@triton.jit
def rows(at, stride: tl.constexpr, steps, T: tl.constexpr, EVEN: tl.constexpr):
    """T consecutive rows as float32; zeros past the last of the block, unless all blocks are of T rows (EVEN)."""
    out = ()
    for u in tl.static_range(T):
        row = tl.load(at + u * stride) if EVEN else tl.load(at + u * stride, mask=u < steps, other=0.0)
        out = out + (row.to(tl.float32),)  # type: ignore[assignment]  # a kernel's tuples grow as they are unrolled
    return out
