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


@triton.jit
def softplus(v):
    """log(1 + e^v) = max(v, 0) + log1p(u), u = exp(-|v|); log1p(u) = 2 atanh(u / (2 + u)), exact for tiny u as well."""
    u = tl.exp2(-tl.abs(v) * LOG2_E)
    s = u / (2.0 + u)
    square = s * s
    series = square * (1 / 13) + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    series = series * square + 1.0
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v), the derivative of softplus."""
    return 1.0 / (1.0 + tl.exp2(-v * LOG2_E))


@triton.jit
def tile(at, stride: tl.constexpr, e, steps, T: tl.constexpr, EVEN: tl.constexpr):
    """The rows of a block side by side, BE x T, float32: every number in one lane only, unlike in `rows`."""
    t = tl.arange(0, T)
    numbers = at + t[None, :] * stride + e[:, None]
    out = tl.load(numbers) if EVEN else tl.load(numbers, mask=(t < steps)[None, :] & (e >= 0)[:, None], other=0.0)
    return out.to(tl.float32)


@triton.jit
def softplus_of_block(pre, steps, T: tl.constexpr, EVEN: tl.constexpr):
    """Step sizes from a tile of what softplus is applied to; 0 past the end of the block."""
    dt = softplus(pre)
    return dt if EVEN else tl.where((tl.arange(0, T) < steps)[None, :], dt, 0.0)


@triton.jit
def unstack(numbers, BE: tl.constexpr, T: tl.constexpr):
    """The T columns of a BE x T tile, each of shape BE; T is a power of two."""
    parts = (numbers,)
    for level in tl.static_range(0, 6):
        if T >> level > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                left, right = tl.split(tl.permute(tl.reshape(parts[i], (BE, 2, T >> (level + 1))), (0, 2, 1)))
                halves = halves + (left, right)  # type: ignore[assignment]  # see `rows`
            parts = halves  # type: ignore[assignment]
    out = ()
    for i in tl.static_range(T):
        out = out + (tl.reshape(parts[i], (BE,)),)  # type: ignore[assignment]
    return out


@triton.jit
def stack(columns, BE: tl.constexpr, T: tl.constexpr):
    """The BE x T tile with these columns: undoes `unstack`."""
    parts = ()
    for i in tl.static_range(T):
        parts = parts + (tl.reshape(columns[i], (BE, 1)),)  # type: ignore[assignment]
    for level in tl.static_range(0, 6):
        if T >> level > 1:
            pairs = ()
            for i in tl.static_range(T >> (level + 1)):
                pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
                pairs = pairs + (tl.reshape(pair, (BE, 2 << level)),)  # type: ignore[assignment]
            parts = pairs  # type: ignore[assignment]
    return parts[0]  # type: ignore[misc]


@triton.jit
def fold(numbers, X: tl.constexpr, R: tl.constexpr):
    """Sums of the rows of an X x R tile, R a power of two.

    By halves, which the compiler can only split once a row is within one lane: it moves the numbers there all at once,
    through shared memory. `tl.sum` would leave them where they are and pass each sum on from lane to lane.
    """
    for level in tl.static_range(0, 10):
        if R >> level > 1:
            left, right = tl.split(tl.reshape(numbers, (X, R >> (level + 1), 2)))
            numbers = left + right
    return tl.reshape(numbers, (X,))


@triton.jit
def sums_over_channels(p, q, BE: tl.constexpr, N: tl.constexpr):
    """Sums over BE of two BE x N tensors, one after the other: 2N numbers.

    First what is in the same lane: a lane holds four neighbouring states, so a channel takes N / 4 of 32 lanes.
    """
    R: tl.constexpr = max(1, min(BE, 128 // N))
    p = tl.sum(tl.reshape(p, (BE // R, R, N)), 0)
    q = tl.sum(tl.reshape(q, (BE // R, R, N)), 0)
    return fold(tl.reshape(tl.permute(tl.join(p, q), (2, 1, 0)), (2 * N, R)), 2 * N, R)


@triton.jit
def sum_over_states(p, BE: tl.constexpr, N: tl.constexpr):
    """Sums over N of a BE x N tensor; first what is in the same lane."""
    R: tl.constexpr = max(1, N // 4)
    return fold(tl.sum(tl.reshape(p, (BE, R, N // R)), 2), BE, R)


@triton.jit
def sums_over_states(p, q, BE: tl.constexpr, N: tl.constexpr):
    """Sums over N of two BE x N tensors, moved between lanes together."""
    R: tl.constexpr = max(1, N // 4)
    p = tl.sum(tl.reshape(p, (BE, R, N // R)), 2)
    q = tl.sum(tl.reshape(q, (BE, R, N // R)), 2)
    both = fold(tl.reshape(tl.permute(tl.join(p, q), (2, 0, 1)), (2 * BE, R)), 2 * BE, R)
    return tl.split(tl.permute(tl.reshape(both, (2, BE)), (1, 0)))
