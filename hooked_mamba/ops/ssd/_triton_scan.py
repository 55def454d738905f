"""The scan of Mamba-2 on a GPU: chunks as matrix products, joined by a walk over the states at their borders.

Forward:  C B^T per group; what each chunk adds to the state; the states entering the chunks; the read-out.
Backward: the same in reverse for the adjoint of the state, then the gradients inside the chunks.

A chunk ends after every position whose state is saved or edited. An edited position is read out after its edit:
its row of C is left out of the chunk's products and multiplied with the edited state instead, in plain torch.

Products are made in bfloat16 for a bfloat16 x, in TF32 for float16 (which has not the range), and for float32 as three
TF32 products each, which is float32 but for the last bit; sums, states and decays are float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from hooked_mamba.ops.interface import ScanOut, StateEdits
from hooked_mamba.ops.ssd._triton_backward import ssd_backward_bc, ssd_backward_gram, ssd_backward_x
from hooked_mamba.ops.ssd._triton_forward import ssd_gram, ssd_read_out
from hooked_mamba.ops.ssd._triton_states import ssd_outer, ssd_pass
from hooked_mamba.ops.ssd._triton_step import ssd_step
from hooked_mamba.ops.triton_launch import Blocks, Events, cut, multiprocessors, on_device

LONGEST_CHUNK = 64
"""Beyond it the backward runs out of registers."""
LANES = 1024
"""Numbers of the state per program of the walk over the chunks."""


def ssd(
    x: Float[Tensor, "b l H P"],
    dt: Float[Tensor, "b l H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    D: Float[Tensor, " H"] | None,
    *,
    h0: Float[Tensor, "b H P N"] | None,
    positions: tuple[int, ...] | None,
    chunk: int = 64,
    edits: StateEdits | None = None,
) -> ScanOut:
    """The scan of Mamba-2; see `hooked_mamba.ops.ssd`. The chunk is rounded up to a power of two, 16, 32 or 64."""
    b, _, H, P = x.shape
    G, N = B.shape[2:]
    dt, A = dt.float(), A.float()
    D, h0 = (None if t is None else t.float() for t in (D, h0))
    B, C = B.to(x.dtype), C.to(x.dtype)
    if x.shape[1] == 1 and edits is None and not _wants_grad(x, dt, A, B, C, D, h0):
        return ssd_step(x, dt, A, B, C, D, h0, positions is not None)
    positions = positions or ()
    if edits is None:
        events = Events((), positions)
        plan = Plan(events, _tile(chunk, LONGEST_CHUNK))
        y, h_last, states = _SSD.apply(x, dt, A, B, C, D, h0, None, None, plan)
        return ScanOut(y, h_last, states if positions else None)
    at = tuple(edits.at)
    scale, add = (None if t is None else t.float().expand(b, len(at), H, P, N) for t in edits[1:])
    saves = tuple(sorted({*positions, *at}))
    plan = Plan(Events(at, saves), _tile(chunk, LONGEST_CHUNK))
    rows = torch.tensor(at, device=x.device)
    y, h_last, states = _SSD.apply(x, dt, A, B, C.index_fill(1, rows, 0.0), D, h0, scale, add, plan)
    edited = states[:, [saves.index(p) for p in at]].view(b, len(at), G, H // G, P, N)
    read = torch.einsum("bkghpn,bkgn->bkghp", edited, C[:, rows].float()).reshape(b, len(at), H, P)
    y = y.index_add(1, rows, read.to(y.dtype))
    return ScanOut(y, h_last, states[:, [saves.index(p) for p in positions]] if positions else None)


def _tile(size: int, most: int) -> int:
    """A size that matrix products can have: a power of two from 16 on."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a tensor."""

    events: Events
    chunk: int

    def chunks(self, x: Tensor) -> Blocks:
        """Cut the sequence."""
        return cut(x.shape[1], self.chunk, 1, self.events, x.device, events_last=True)


@dataclass(frozen=True)
class _Tiles:
    """Sizes of the tiles of matrix products, and how they are multiplied."""

    Q: int
    BP: int
    BN: int
    DOT: tl.dtype
    PRECISION: str

    @classmethod
    def of(cls, plan: Plan, x: Tensor, N: int) -> _Tiles:
        dot, precision = tl.float32, "tf32"
        if x.dtype == torch.bfloat16 and not knobs.runtime.interpret:  # the interpreter has no bfloat16 products
            dot = tl.bfloat16
        backend, arch = _target()
        if x.dtype == torch.float32:
            precision = "ieee" if backend == "hip" else "tf32x3"
        widest = {torch.bfloat16: (64, 64), torch.float16: (64, 32), torch.float32: (32, 32)}[x.dtype]
        # Operands of products must stand in registers there.
        if backend == "cuda" and isinstance(arch, int) and not 90 <= arch < 120:
            widest = (16, 16) if x.dtype == torch.float32 else (32, 32)
        return cls(plan.chunk, _tile(x.shape[3], widest[0]), _tile(N, widest[1]), dot, precision)

    def options(self, *absent: str, num_warps: int = 4) -> dict:
        """Keyword arguments of a launch."""
        return {k: v for k, v in vars(self).items() if k not in absent} | {"num_warps": num_warps, "num_stages": 2}


def _target() -> tuple[str, int | str]:
    """What is compiled for: "cuda" and the compute capability times ten, or "hip" and a name."""
    if knobs.runtime.interpret:
        return "cuda", 90
    target = driver.active.get_current_target()
    return target.backend, target.arch


def _dense_rows(t: Tensor) -> Tensor:
    """b l heads size with each row b l in one piece and rows a fixed distance apart; a copy if need be."""
    fits = t.stride(3) == 1 and (t.stride(2) == t.shape[3] or t.shape[2] == 1)
    fits = fits and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    return t if fits else t.contiguous()


class _SSD(torch.autograd.Function):
    """dt, A, D, h0, scale and add are float32, B and C of the type of x."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, scale, add, plan):
        x, B, C = (_dense_rows(t) for t in (x, B, C))
        dt, A, D, h0, scale, add = (None if t is None else t.contiguous() for t in (dt, A, D, h0, scale, add))
        need_scale = ctx.needs_input_grad[7]
        y, h_last, states, entering, before = _forward(x, dt, A, B, C, D, h0, scale, add, plan, need_scale)
        ctx.save_for_backward(
            x, dt, A, B, C, D, scale, entering if _needs_states(ctx.needs_input_grad) else None, before
        )
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return y, h_last, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates):
        x = ctx.saved_tensors[0]
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
        dh_last, dstates = (None if g is None else g.contiguous() for g in (dh_last, dstates))
        grads = _backward(*ctx.saved_tensors, dy, dh_last, dstates, ctx.plan, ctx.needs_input_grad)
        return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _needs_states(needs: tuple[bool, ...]) -> bool:
    """Does a gradient depend on the states: that to dt, A, B, C or D?"""
    return any(needs[1:6])


def _gram(x, B, C, chunks, tiles):
    b, l = x.shape[:2]
    G, N = B.shape[2:]
    CB = torch.empty(b, chunks.count, G, tiles.Q, tiles.Q, dtype=torch.float32, device=x.device)
    ssd_gram[(G * chunks.count * b,)](
        B, C, chunks.table, CB, l, G, N, B.stride(1), C.stride(1), chunks.count, **tiles.options("BP"),
    )  # fmt: skip
    return CB


def _outer(V, K, dt, A, chunks, tiles, into):
    """What each chunk adds to the state (or to its adjoint, if into), and the decay over each chunk."""
    b, l, H, P = V.shape
    G, N = K.shape[2:]
    part = dt.new_empty(b, chunks.count, H, P, N)
    decay = dt.new_empty(b, chunks.count, H)
    grid = (triton.cdiv(N, tiles.BN) * triton.cdiv(P, tiles.BP) * H * chunks.count * b,)
    ssd_outer[grid](
        V, K, dt, A, chunks.table, part, decay,
        l, H, P, N, V.stride(1), K.stride(1), chunks.count, H // G, INTO=into, **tiles.options(),
    )  # fmt: skip
    return part, decay


def _forward(x, dt, A, B, C, D, h0, scale, add, plan, need_scale):
    b, l, H, P = x.shape
    G, N = B.shape[2:]
    chunks, tiles = plan.chunks(x), _Tiles.of(plan, x, N)
    edits, saves = plan.events.edits, plan.events.saves
    y = torch.empty((b, l, H, P), dtype=x.dtype, device=x.device)
    h_last = dt.new_empty(b, H, P, N)
    states = dt.new_empty(b, len(saves), H, P, N)
    before = dt.new_empty(b, len(edits), H, P, N) if need_scale else None
    entering = torch.empty(b, chunks.count, H, P, N, dtype=_border_type(x), device=x.device)
    with on_device(x):
        CB = _gram(x, B, C, chunks, tiles)
        part, decay = _outer(x, B, dt, A, chunks, tiles, into=False)
        ssd_pass[(triton.cdiv(P * N, LANES) * H * b,)](
            part, decay, h0, scale, add, None, chunks.table, entering, h_last, states, before, None,
            H, P * N, chunks.count, len(edits), len(saves), LANES=LANES, REVERSE=False, num_warps=4,
        )  # fmt: skip
        ssd_read_out[(triton.cdiv(P, tiles.BP) * H * chunks.count * b,)](
            x, dt, A, C, D, CB, entering, chunks.table, y,
            l, H, P, N, x.stride(1), C.stride(1), chunks.count, H // G, **tiles.options(),
        )  # fmt: skip
    return y, h_last, states, entering, before


def _border_type(x: Tensor) -> torch.dtype:
    """Type of the states at the borders of chunks, between kernels: no wider than the products that read them."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _backward(x, dt, A, B, C, D, scale, entering, before, dy, dh_last, dstates, plan, needs):
    b, l, H, P = x.shape
    G, N = B.shape[2:]
    chunks, tiles = plan.chunks(x), _Tiles.of(plan, x, N)
    n_edits, n_saves = len(plan.events.edits), len(plan.events.saves)
    p_blocks = triton.cdiv(P, tiles.BP)
    frozen = not _needs_states(needs)
    dx = torch.empty((b, l, H, P), dtype=x.dtype, device=x.device)
    ddt, dA = dt.new_empty(p_blocks, b, l, H), dt.new_empty(p_blocks, b, chunks.count, H)
    dD = torch.empty_like(dA)
    dh0 = dt.new_empty(b, H, P, N)
    edited = dt.new_empty(b, n_edits, H, P, N) if needs[7] or needs[8] else None
    leaving = torch.empty(b, chunks.count, H, P, N, dtype=_border_type(x), device=x.device)
    with on_device(x):
        CB = _gram(x, B, C, chunks, tiles)
        part, decay = _outer(dy, C, dt, A, chunks, tiles, into=True)
        ssd_pass[(triton.cdiv(P * N, LANES) * H * b,)](
            part, decay, dh_last, scale, None, dstates, chunks.table, leaving, dh0, None, None, edited,
            H, P * N, chunks.count, n_edits, n_saves, LANES=LANES, REVERSE=True, num_warps=4,
        )  # fmt: skip
        ssd_backward_x[(p_blocks * H * chunks.count * b,)](
            x, dt, A, B, C, D, CB, entering, leaving, dy, chunks.table, dx, ddt, dA, dD,
            l, H, P, N, x.stride(1), B.stride(1), C.stride(1), chunks.count, H // G, b * l, 
            FROZEN=frozen, **tiles.options(num_warps=8),
        )  # fmt: skip
        dB = dC = None
        if needs[3] or needs[4]:
            dB, dC = _backward_bc(x, dt, A, B, C, entering, leaving, dy, chunks, tiles)
    dscale = edited * before if needs[7] else None
    if frozen:
        return dx, None, None, None, None, None, dh0, dscale, edited
    dD = None if D is None else dD.sum((0, 1, 2))
    return dx, ddt.sum(0), dA.sum((0, 1, 2)), dB, dC, dD, dh0, dscale, edited


def _backward_bc(x, dt, A, B, C, entering, leaving, dy, chunks, tiles):
    """Gradients to B and C; the heads of a group are shared out if there are too few chunks and groups."""
    b, l, H, P = x.shape
    G, N = B.shape[2:]
    programs = G * chunks.count * b
    parts = min(H // G, triton.cdiv(2 * multiprocessors(x.device), programs))
    per_part = triton.cdiv(H // G, parts)
    parts = triton.cdiv(H // G, per_part)
    K = dt.new_empty(parts, b, chunks.count, G, tiles.Q, tiles.Q)
    ssd_backward_gram[(programs * parts,)](
        x, dt, A, dy, chunks.table, K,
        l, H, P, x.stride(1), chunks.count, H // G, per_part, K[0].numel(), **tiles.options("BN", num_warps=8),
    )  # fmt: skip
    dB, dC = dt.new_empty(parts, b, l, G, N), dt.new_empty(parts, b, l, G, N)
    ssd_backward_bc[(programs * parts * triton.cdiv(N, tiles.BN),)](
        x, dt, A, B, C, K.sum(0), entering, leaving, dy, chunks.table, dB, dC,
        l, H, P, N, x.stride(1), B.stride(1), C.stride(1), chunks.count, H // G, per_part, b * l,
        **tiles.options(num_warps=8),
    )  # fmt: skip
    return dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
