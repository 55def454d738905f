"""Mamba-2 by the authors' own Triton kernels (package mamba_ssm), as a backend to compare with; never chosen unasked.

They take no edits and save no states.
"""

from __future__ import annotations

from jaxtyping import Float
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from hooked_mamba.ops.choose import backend
from hooked_mamba.ops.interface import ScanOut
from hooked_mamba.ops.mamba_ssm_limits import refusal


@backend("ssd", takes={"h0", "grad"}, refuses=refusal)
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
) -> ScanOut:
    """The scan of Mamba-2; see `hooked_mamba.ops.ssd`. The chunk is rounded up to a power of two from 16 on."""
    if positions is not None:
        raise ValueError("mamba_ssm's chunked scan saves no states: use another backend")
    chunk = max(16, 1 << (chunk - 1).bit_length())
    y, h_last = mamba_chunk_scan_combined(
        x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), chunk,
        D=None if D is None else D.float(), initial_states=h0, return_final_states=True,
    )  # fmt: skip
    return ScanOut(y, h_last.float(), None)
