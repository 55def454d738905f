"""The adjoint of the held scan: many covectors on a few rows of a run, against a loop in float64."""

from __future__ import annotations

from inspect import unwrap as unchecked

import pytest
import torch

from hooked_mamba import ops

SHAPES = [(1, 1, 1, 16, 1), (7, 2, 5, 16, 4), (5, 3, 37, 32, 16), (3, 1, 18, 20, 3)]
"""n, b, l, E, N."""


def inputs(n, b, l, E, N, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "v": draw(n, l, E),
        "rows": torch.randint(b, (n,), generator=generator),
        "dt": draw(b, l, E).exp() / 8,
        "A": -draw(E, N).exp(),
        "B": draw(b, l, N),
        "C": draw(b, l, N),
        "D": draw(E),
    }


def by_hand(v, rows, dt, A, B, C, D):
    """The response to a unit of x at every place, and of h0, read by v."""
    n, l, E = v.shape
    at_x, at_h0 = torch.zeros_like(v), v.new_zeros(n, *A.shape)
    for i, r in enumerate(rows.tolist()):
        passed = torch.ones_like(A)  # what is left of h0
        for t in range(l):
            passed = passed * torch.exp(dt[r, t, :, None] * A)
            at_h0[i] += v[i, t, :, None] * C[r, t] * passed
        for s in range(l):
            h = dt[r, s, :, None] * B[r, s].expand(E, -1)
            for t in range(s, l):
                h = h if t == s else h * torch.exp(dt[r, t, :, None] * A)
                at_x[i, s] += v[i, t] * (h @ C[r, t])
            at_x[i, s] += D * v[i, s]
    return at_x, at_h0


@pytest.mark.parametrize("backend", ["numba", "torch", "naive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_a_loop(shape, backend):
    given = inputs(*shape)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    expected = by_hand(**exact)
    if backend != "numba":
        for found, right in zip(ops.pull_scan(**exact, backend=backend), expected, strict=True):
            assert torch.allclose(found, right, rtol=0, atol=1e-12 * float(right.abs().max()))
    else:
        pytest.importorskip("numba")
    for found, right in zip(ops.pull_scan(**given, backend=backend), expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), right, rtol=0, atol=2e-6 * float(right.abs().max()))


def test_threads_share_the_channels(monkeypatch):
    pytest.importorskip("numba")
    from hooked_mamba.ops import numba_compile

    given = inputs(5, 3, 9, 48, 4)
    alone = ops.pull_scan(**given, backend="numba")
    monkeypatch.setattr(numba_compile, "threads_for", lambda units, work: 3)
    for found, right in zip(ops.pull_scan(**given, backend="numba"), alone, strict=True):
        assert torch.equal(found, right)


def test_a_row_for_each_covector():
    given = inputs(4, 2, 3, 16, 2)
    with pytest.raises(ValueError, match=r"rows has shape \[3\], expected a row for each of 4"):
        unchecked(ops.pull_scan)(**given | {"rows": given["rows"][:3]})
