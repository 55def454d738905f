"""Join the chunks of a scan whose chunks have run side by side.

    state_0 = first,    state_{c+1} = decay_c state_c + part_c

for every number of the state, over chunks c in order or (REVERSE, for adjoints) from the last to the first. What comes
out is the state that enters each chunk, and the state that leaves the last one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.triton_launch import on_device

LANES = 128


@triton.jit
def join_kernel(
    DECAY, PART, FIRST, ENTERING, LEAVING, size, n_chunks,
    LANES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of LANES numbers of the state x batch, flattened. All float32 and contiguous."""
    columns = tl.cdiv(size, LANES)
    pid = tl.program_id(0)
    b = (pid // columns).to(tl.int64)
    i = (pid % columns) * LANES + tl.arange(0, LANES)
    inside = i < size
    state = tl.zeros((LANES,), tl.float32)
    if FIRST is not None:
        state = tl.load(FIRST + b * size + i, mask=inside, other=0.0)
    for step in range(n_chunks):
        c = n_chunks - 1 - step if REVERSE else step
        at = (b * n_chunks + c) * size + i
        tl.store(ENTERING + at, state, mask=inside)
        decay = tl.load(DECAY + at, mask=inside, other=0.0)
        state = decay * state + tl.load(PART + at, mask=inside, other=0.0)
    tl.store(LEAVING + b * size + i, state, mask=inside)


def join_chunks(
    decay: Float[Tensor, "b c E N"],
    part: Float[Tensor, "b c E N"],
    first: Float[Tensor, "b E N"] | None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "b c E N"], Float[Tensor, "b E N"]]:
    """States that enter each chunk, and the state that leaves the last (or first, if reverse)."""
    b, n_chunks, *state = part.shape
    entering = torch.empty_like(part)
    leaving = part.new_empty(b, *state)
    size = leaving[0].numel()
    with on_device(part):
        join_kernel[(triton.cdiv(size, LANES) * b,)](
            decay, part, first, entering, leaving, size, n_chunks, LANES=LANES, REVERSE=reverse, num_warps=1
        )
    return entering, leaving
