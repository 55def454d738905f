"""The selective scan of Mamba-1 through numba: one pass, no tensor of shape b l E N, float32 on the CPU.

The equations are those of the torch backend; the kernels are in `_numba_kernels` and `_numba_gated`. They are
compiled at their first call and kept on disk. As many threads share the channels as torch would use.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.memory import fresh
from hooked_mamba.ops.numba_compile import refusal, share, threads_for
from hooked_mamba.ops.numba_functions import flat_rows, worth_it
from hooked_mamba.ops.numba_lanes import LANES
from hooked_mamba.ops.numba_packed import pack_states, unpack_states
from hooked_mamba.ops.precision import to_state_dtype
from hooked_mamba.ops.selective_scan import _numba_kernels as kernels
from hooked_mamba.ops.selective_scan._numba_gated import gated
from hooked_mamba.ops.selective_scan._numba_pull import pull
from hooked_mamba.ops.selective_scan._step import selective_step


def _probe() -> None:
    # Whatever the default type and device are set to.
    x = torch.zeros(1, 2, LANES, dtype=torch.float32, device="cpu")
    A, B, D = x[0, 0, :, None], x[..., :1], x[0, 0]
    _SelectiveScan.apply(x, x, A, B, B, D, None, None, LANES)


@backend("selective_scan", takes={"h0", "states", "grad"}, refuses=lambda x, N: refusal(x, _probe))
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
) -> ScanOut:
    """The fused scan; see `hooked_mamba.ops.selective_scan`."""
    if x.shape[1] == 1:
        return selective_step(x, dt, A, B, C, D, h0, positions is not None)
    dtype = x.dtype
    x, dt, A, B, C, D, h0 = to_state_dtype(x, dt, A, B, C, D, h0)
    E = x.shape[2]
    missing = -E % LANES
    if missing:
        x, dt = F.pad(x, (0, missing)), F.pad(dt, (0, missing))
        D = None if D is None else F.pad(D, (0, missing))
        A = F.pad(A, (0, 0, 0, missing))
    D = x.new_zeros(E + missing) if D is None else D
    y, h_last, states = _SelectiveScan.apply(x, dt, A, B, C, D, h0, positions, E)
    return ScanOut((y[..., :E] if missing else y).to(dtype), h_last, states)


@backend("gated_scan", takes={"h0"}, refuses=lambda x, N: refusal(x, _probe))
def gated_scan(
    x: Float[Tensor, "b l E"],
    dt_pre: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"],
    z: Float[Tensor, "b l E"],
    h0: Float[Tensor, "b E N"] | None,
) -> tuple[Float[Tensor, "b l E"], Float[Tensor, "b E N"]] | None:
    """See `hooked_mamba.ops.gated_scan`; None where this kernel does not fit."""
    b, l, E = x.shape
    if E % LANES or not worth_it(x):
        return None
    x, dt_pre, B, C, D = (t.contiguous() for t in (x, dt_pre, B, C, D))
    A, y = pack_states(A, E), x.new_empty(x.shape)
    h = A.new_zeros(b, *A.shape) if h0 is None else pack_states(h0, E)
    flat_z, _, z_row = flat_rows(z)
    arrays = tuple(t.numpy() for t in (x, dt_pre, A, B, C, D, flat_z))
    V = A.shape[0]
    share(gated, b * V, b * l * E * A.shape[1], (*arrays, z_row, h.numpy(), y.numpy()), ())
    return y, unpack_states(h, E)


@backend("pull_scan", takes={"h0"}, refuses=lambda x, N: refusal(x, _probe))
def pull_scan(
    v: Float[Tensor, "n l E"],
    rows: Int[Tensor, " n"],
    dt: Float[Tensor, "b l E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " E"],
) -> tuple[Float[Tensor, "n l E"], Float[Tensor, "n E N"]] | None:
    """See `hooked_mamba.ops.pull_scan`; None where this kernel does not fit."""
    (n, l, E), N = v.shape, A.shape[1]
    if E % LANES or any(t.dtype != torch.float32 for t in (v, dt)):
        return None
    v, dt, A, B, C, D = (t.to(torch.float32).contiguous() for t in (v, dt, A, B, C, D))
    A, dx = pack_states(A, E), torch.empty_like(v)
    V = A.shape[0]
    g = v.new_zeros(n, V, N, LANES)
    order = rows.argsort(stable=True)
    bounds = torch.searchsorted(rows[order], torch.arange(len(dt) + 1))
    before = _arrays(dt, A, B, C, D, order, bounds, v, g)
    share(pull, len(dt) * V, n * l * E * N, before, _arrays(dx))
    return dx, unpack_states(g, E)


def _empty() -> Tensor:
    return torch.empty(0, 0, 0, 0, dtype=torch.float32, device="cpu")


class _SelectiveScan(torch.autograd.Function):
    """x, dt, A, D have E padded to a multiple of 16; h0, h_last and states have the true E."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, h0, positions, E):
        b, l, padded = x.shape
        N = A.shape[1]
        x, dt, B, C, D = (t.contiguous() for t in (x, dt, B, C, D))
        A = pack_states(A, padded)
        V = A.shape[0]
        h = x.new_zeros(b, V, N, LANES) if h0 is None else pack_states(h0, E)
        y = torch.empty_like(x)
        ctx.full = any(ctx.needs_input_grad[1:6])
        starts = fresh(x, b, -(-l // kernels.T), V, N * LANES) if ctx.full else _empty()
        states = _empty() if positions is None else fresh(x, b, len(positions), E, N)
        at = np.array(positions or (), np.int64)
        inputs = _arrays(x, dt, A, B, C, D, h, y, starts, states)
        share(kernels.forward, b * V, b * l * padded * N, (*inputs, at), ())
        ctx.positions, ctx.E, ctx.N = at, E, N
        ctx.save_for_backward(x if ctx.full else None, dt, A, B, C, D, starts)
        ctx.set_materialize_grads(False)
        return y, unpack_states(h, E), None if positions is None else states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last, dstates):
        x, dt, A, B, C, D, starts = ctx.saved_tensors
        b, l, padded = dt.shape
        V, N = A.shape[:2]
        dy = torch.zeros_like(dt) if dy is None else dy.contiguous()
        g = dt.new_zeros(b, V, N, LANES) if dh_last is None else pack_states(dh_last, ctx.E)
        at = ctx.positions if dstates is not None else np.empty(0, np.int64)
        dstates = _empty() if dstates is None else dstates.contiguous()
        work = b * l * padded * N
        dx = torch.empty_like(dt)
        if not ctx.full:
            share(kernels.adjoint, b * V, work, (*_arrays(dt, A, B, C, D, dy, g, dstates), at), _arrays(dx))
            return dx, None, None, None, None, None, _h0_grad(ctx, g), None, None
        ddt = torch.empty_like(dt)
        dA, dD = dt.new_zeros(b, V, N, LANES), dt.new_zeros(b, padded)
        threads = threads_for(b * V, work)
        dB, dC = dt.new_zeros(threads, b, l, N), dt.new_zeros(threads, b, l, N)
        inputs = _arrays(x, dt, A, B, C, D, starts, dy, g, dstates)
        shares = [_arrays(dx, ddt, dA, dB[i], dC[i], dD) for i in range(threads)]
        share(kernels.backward, b * V, work, (*inputs, at), *shares)
        dA = unpack_states(dA.sum(0), padded)
        return dx, ddt, dA, dB.sum(0), dC.sum(0), dD.sum(0), _h0_grad(ctx, g), None, None


def _h0_grad(ctx, g: Tensor) -> Tensor | None:
    return unpack_states(g, ctx.E) if ctx.needs_input_grad[6] else None


def _arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().numpy() for t in tensors)
