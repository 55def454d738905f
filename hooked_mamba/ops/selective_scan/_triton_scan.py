"""The selective scan of Mamba-1 on a GPU: which kernels run, with what, in forward and backward.

Forward: one kernel, or three if the channels alone do not fill the device (see `mamba1_forward`).
Backward: the adjoint alone if only x, h0 or additive edits need a gradient; else the adjoint entering each chunk, then
all gradients. A backward costs no memory between forward and backward beyond one state per 64 positions.
With a gate z the same kernels apply softplus to dt and the gate to y, and carry gradients through both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.selective_scan._triton_adjoint import mamba1_adjoint
from hooked_mamba.ops.selective_scan._triton_backward import mamba1_backward
from hooked_mamba.ops.selective_scan._triton_forward import mamba1_forward
from hooked_mamba.ops.selective_scan._triton_join import join_chunks
from hooked_mamba.ops.triton_launch import Blocks, Events, cut, multiprocessors, on_device, row_major

CHUNK = 64
"""Positions between the states kept for the backward."""
T_WALK, T_BACKWARD = 8, 4
"""Positions unrolled by the kernels that walk once, and by the backward, which keeps that many states in registers."""
STATES_BACKWARD, LONG = 512, 128
"""Numbers of the state per program (one warp) in the backward; half of that from N = LONG on, or registers run out."""
PROGRAMS_BACKWARD = 16
"""Programs of the backward per multiprocessor: twice what its registers let run at once."""


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a tensor."""

    events: Events
    dense: bool
    """States at every position."""

    def blocks(self, x: Tensor, T: int, joint: bool) -> Blocks:
        """Cut the sequence into blocks of T positions.

        Kernels that hand over states at the starts of chunks (joint) must begin them at the same positions, so where
        events make blocks of uneven lengths they use the same blocks.
        """
        if joint and (self.events.edits or self.events.saves):
            T = T_BACKWARD
        T = min(T, triton.next_power_of_2(x.shape[1]))
        return cut(x.shape[1], T, CHUNK // T, self.events, x.device)


class Inputs(NamedTuple):
    """What the kernels read: x, dt and z with rows a fixed distance apart, all else contiguous and float32."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    scale: Tensor | None
    add: Tensor | None
    z: Tensor | None
    """Gate before SiLU; dt is then what softplus is applied to."""

    @property
    def options(self) -> dict[str, int | bool]:
        """Constants of every kernel that walks."""
        z_row = 0 if self.z is None else self.z.stride(1)
        sizes = {"E": self.x.shape[2], "N": self.A.shape[1], "dt_row": self.dt.stride(1), "z_row": z_row}
        return sizes | {"SOFTPLUS": self.z is not None, "num_warps": 1}


def selective_scan(
    x: Float[Tensor, "b l E"],
    dt: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"] | None,
    *,
    h0: Float[Tensor, "b E N"] | None,
    positions: tuple[int, ...] | None,
    edits: StateEdits | None = None,
) -> ScanOut:
    """The scan of Mamba-1; see `hooked_mamba.ops.selective_scan`."""
    return _scan(x, dt, A, B, C, D, h0, positions, edits, None)


def gated_scan(
    x: Float[Tensor, "b l E"],
    dt_pre: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"],
    z: Float[Tensor, "b l E"],
    h0: Float[Tensor, "b E N"] | None,
) -> tuple[Float[Tensor, "b l E"], Float[Tensor, "b E N"]]:
    """The scan between softplus and gate; see `hooked_mamba.ops.gated_scan`. All of it is float32 inside."""
    y, h_last, _ = _scan(x, dt_pre, A, B, C, D, h0, None, None, z)
    return y, h_last


def _scan(x, dt, A, B, C, D, h0, positions, edits, z) -> ScanOut:
    """Bring all to the types and sizes of the kernels."""
    b, l, E = x.shape
    N = A.shape[1]
    A, B, C = A.float(), B.float(), C.float()
    D, h0 = (None if t is None else t.float() for t in (D, h0))
    padding = triton.next_power_of_2(N) - N
    scale = add = None
    if edits is not None:
        full = (b, len(edits.at), E, N)
        scale, add = (None if t is None else t.float().expand(full) for t in edits[1:])
    if padding:  # states that nothing enters (B = 0) and nothing reads (C = 0)
        A, B, C = (F.pad(t, (0, padding)) for t in (A, B, C))
        h0, scale, add = (None if t is None else F.pad(t, (0, padding)) for t in (h0, scale, add))
    dense = positions is not None and len(positions) == l
    plan = Plan(Events(() if edits is None else tuple(edits.at), () if dense else positions or ()), dense)
    y, h_last, states = _SelectiveScan.apply(x, dt, A, B, C, D, h0, scale, add, z, plan)
    if padding:
        h_last = h_last[..., :N]
        states = None if states is None else states[..., :N]
    return ScanOut(y, h_last, states)


class _SelectiveScan(torch.autograd.Function):
    """A, B, C, D, h0, scale and add are float32, N is a power of two."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, scale, add, z, plan):
        x, dt, z = (None if t is None else row_major(t) for t in (x, dt, z))
        A, B, C, D, h0, scale, add = (None if t is None else t.contiguous() for t in (A, B, C, D, h0, scale, add))
        inputs = Inputs(x, dt, A, B, C, D, scale, add, z)
        y, h_last, states, starts = _forward(inputs, h0, plan, keep_starts=_needs_states(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, starts)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return y, h_last, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates):
        *saved, starts = ctx.saved_tensors
        inputs = Inputs(*saved)
        x = inputs.x
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
        dh_last, dstates = (None if g is None else g.contiguous() for g in (dh_last, dstates))
        needs = ctx.needs_input_grad
        if _needs_states(needs):
            grads = _backward(inputs, starts, dy, dh_last, dstates, ctx.plan)
        else:
            dx, dh0, dadd = _adjoint(inputs, dy, dh_last, dstates, ctx.plan, need_add=needs[8])
            grads = (dx, None, None, None, None, None, dh0, None, dadd, None)
        return (*(g if needed else None for g, needed in zip(grads, needs, strict=False)), None)


def _needs_states(needs: tuple[bool, ...]) -> bool:
    """Does a gradient depend on the states: that to dt, A, B, C, D, the scale of an edit or the gate?"""
    return any(needs[1:6]) or needs[7] or needs[9]


def _channels(columns_to_fill: int, E: int, N: int, device: torch.device) -> tuple[int, bool]:
    """Channels per program of a walk, and whether chunks must be shared out to fill the device.

    A program is one warp with 4 or 8 numbers of the state per lane; a device wants about 12 warps per multiprocessor
    of a walk along the whole sequence, and below 4 it is better to walk twice, chunk by chunk.
    """
    warps = 4 * multiprocessors(device)
    few, many = max(1, min(64, 128 // N)), max(1, min(64, 256 // N))
    if columns_to_fill * triton.cdiv(E, many) >= 3 * warps:
        return many, False
    if columns_to_fill * triton.cdiv(E, few) >= warps:
        return few, False
    return many, True


def _forward(inputs, h0, plan, keep_starts):
    x, dt, A, B, C, D, scale, add, z = inputs
    b, l, E = x.shape
    N = A.shape[1]
    blocks = plan.blocks(x, T_WALK, joint=keep_starts)
    BE, split = _channels(b, E, N, x.device)
    split = split and blocks.chunks > 1
    n_edits, n_saves = len(plan.events.edits), l if plan.dense else len(plan.events.saves)
    y = torch.empty((b, l, E), dtype=x.dtype, device=x.device)
    h_last = A.new_empty(b, E, N)
    states = A.new_empty(b, n_saves, E, N) if n_saves else None
    sizes = (l, blocks.count, blocks.chunks, blocks.per_chunk, n_edits, n_saves)
    options = inputs.options | {"x_row": x.stride(1), "BE": BE, "T": blocks.T, "EVEN": blocks.even, "SPLIT": split}
    grid = (triton.cdiv(E, BE) * b * (blocks.chunks if split else 1),)
    entering, kept = h0, None
    with on_device(x):
        if split:
            part, decay = A.new_empty(b, blocks.chunks, E, N), A.new_empty(b, blocks.chunks, E, N)
            mamba1_forward[grid](
                x, dt, A, B, C, D, None, None, scale, add, blocks.table, None, None, part, decay, None, *sizes,
                READ_OUT=False, DENSE=False, **options,
            )  # fmt: skip
            entering, _ = join_chunks(decay, part, h0)
        elif keep_starts:
            kept = A.new_empty(b, blocks.chunks, E, N)
        mamba1_forward[grid](
            x, dt, A, B, C, D, z, entering, scale, add, blocks.table, y, kept, h_last, None, states, *sizes,
            READ_OUT=True, DENSE=plan.dense, **options,
        )  # fmt: skip
    return y, h_last, states, (entering if split else kept) if keep_starts else None


def _launch_adjoint(inputs, dy, incoming, dstates, plan, blocks, BE, split, dx, dadd, outgoing, decay):
    """Walk from the end: for gradients (dx is a tensor), or (None) for what each chunk adds and how it shrinks."""
    _, dt, A, B, C, D, scale, _, z = inputs
    b, l, E = dy.shape
    mamba1_adjoint[(triton.cdiv(E, BE) * b * (blocks.chunks if split else 1),)](
        dy, dt, A, B, C, D, z, incoming, dstates, scale, blocks.table, dx, dadd, outgoing, decay,
        l, blocks.count, blocks.chunks, blocks.per_chunk, len(plan.events.edits), len(plan.events.saves),
        BE=BE, T=blocks.T, EVEN=blocks.even, SPLIT=split, WRITE_DX=dx is not None,
        DENSE=plan.dense and dstates is not None, **inputs.options,
    )  # fmt: skip


def _incoming(inputs, dy, dh_last, dstates, plan, blocks, BE):
    """Gradient to the state at the end of each chunk."""
    part, decay = (inputs.A.new_empty(dy.shape[0], blocks.chunks, *inputs.A.shape) for _ in "pd")
    _launch_adjoint(inputs, dy, None, dstates, plan, blocks, BE, True, None, None, part, decay)
    return join_chunks(decay, part, dh_last, reverse=True)[0]


def _adjoint(inputs, dy, dh_last, dstates, plan, need_add):
    """Gradients to x, h0 and the additive edits, with all else constant."""
    x, A = inputs.x, inputs.A
    b, _, E = x.shape
    N = A.shape[1]
    blocks = plan.blocks(x, T_WALK, joint=False)
    BE, split = _channels(b, E, N, x.device)
    split = split and blocks.chunks > 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dadd = A.new_empty(b, len(plan.events.edits), E, N) if need_add else None
    incoming, dh0 = dh_last, A.new_empty(b, E, N)
    with on_device(x):
        if split:
            incoming = _incoming(inputs, dy, dh_last, dstates, plan, blocks, BE)
        _launch_adjoint(inputs, dy, incoming, dstates, plan, blocks, BE, split, dx, dadd, dh0, None)
    return dx, dh0, dadd


def _backward(inputs, starts, dy, dh_last, dstates, plan):
    """All gradients."""
    x, dt, A, B, C, D, scale, add, z = inputs
    b, l, E = x.shape
    N = A.shape[1]
    blocks = plan.blocks(x, T_BACKWARD, joint=True)
    BE = max(1, min(64, STATES_BACKWARD // (N if N < LONG else 2 * N)))
    columns = triton.cdiv(E, BE)
    dx, ddt, dz = (None if t is None else torch.empty((b, l, E), dtype=t.dtype, device=x.device) for t in (x, dt, z))
    filled, items = columns * BE, columns * b * blocks.chunks
    dA, dD = A.new_empty(b, blocks.chunks, filled, N), A.new_empty(b, blocks.chunks, filled)
    dh0, dBC = A.new_empty(b, filled, N), A.new_empty(columns, b, l, 2 * N)
    programs = max(1, min(items, PROGRAMS_BACKWARD * multiprocessors(x.device)))
    scratch = A.new_empty(programs, blocks.per_chunk, BE, N)
    dscale, dadd = (None if t is None else torch.empty_like(t) for t in (scale, add))
    with on_device(x):
        incoming = dh_last
        if blocks.chunks > 1:
            walk, walk_BE = plan.blocks(x, T_WALK, joint=True), max(1, min(64, 256 // N))
            incoming = _incoming(inputs, dy, dh_last, dstates, plan, walk, walk_BE)
        mamba1_backward[(programs,)](
            x, dt, A, B, C, D, z, starts, scale, add, blocks.table, dy, incoming, dstates, scratch,
            dx, ddt, dA, dBC, dD, dz, dh0, dscale, dadd,
            l, blocks.count, blocks.chunks, blocks.per_chunk, len(plan.events.edits), len(plan.events.saves),
            b * l, items,
            x_row=x.stride(1), BE=BE, T=blocks.T, EVEN=blocks.even, DENSE=plan.dense and dstates is not None,
            **inputs.options,
        )  # fmt: skip
    dA, dD = dA.sum((0, 1))[:E], None if D is None else dD.sum((0, 1))[:E]
    dB, dC = dBC.sum(0).split(N, -1)
    return dx, ddt, dA, dB, dC, dD, dh0[:, :E], dscale, dadd, dz
