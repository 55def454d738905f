"""The first-order scan: plain torch against the naive loop."""

from __future__ import annotations

from inspect import unwrap as unchecked

import pytest
import torch

from hooked_mamba.ops import linear_scan

# Shape of a for b of shape 2 9 3 4: full, a decay per head, shared by the batch, by all positions, and so on.
DECAYS = [(2, 9, 3, 4), (2, 9, 3, 1), (2, 9, 1, 1), (1, 9, 3, 4), (2, 1, 3, 4), (9, 1, 4), (3, 4), ()]


def _grads(a, b, h0, backend):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (a, b, h0)]
    h = linear_scan(leaves[0], leaves[1], h0=leaves[2], backend=backend)
    grads = torch.autograd.grad(h.cos().sum(), [t for t in leaves if t is not None], allow_unused=True)
    return h, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=False))


@pytest.mark.parametrize("shape", DECAYS)
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 4e-6)])
def test_agrees_with_the_loop(shape, with_h0, dtype, tolerance):
    torch.manual_seed(0)
    a, b = 2 * torch.rand(shape) - 1, torch.randn(2, 9, 3, 4)
    h0 = torch.randn(2, 3, 4) if with_h0 else None
    got = _grads(*(None if t is None else t.to(dtype) for t in (a, b, h0)), "torch")
    expected = _grads(*(None if t is None else t.double() for t in (a, b, h0)), "naive")
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("length", [1, 2, 65])
def test_gradcheck_with_zero_and_negative_decays(length):
    torch.manual_seed(0)
    a, b, h0 = torch.randn(1, length, 2), torch.randn(1, length, 2), torch.randn(1, 2)
    a[:, length // 2] = 0
    tensors = tuple(t.double().requires_grad_() for t in (a, b, h0))
    assert torch.autograd.gradcheck(lambda a, b, h0: linear_scan(a, b, h0=h0, backend="torch"), tensors)


def test_plain_b_l():
    h = linear_scan(torch.tensor(2.0), torch.ones(1, 4))
    assert h.tolist() == [[1, 3, 7, 15]]


def test_half_precision_accumulates_in_float32():
    b = torch.full((1, 300), 1.0, dtype=torch.bfloat16)
    h = linear_scan(torch.ones((), dtype=torch.bfloat16), b)
    # Summing 1 in bfloat16 itself would stop at 256.
    assert h.dtype == torch.bfloat16
    assert h[0, -1] == 300


def test_not_contiguous():
    torch.manual_seed(0)
    a, b = torch.rand(4, 9, 2).transpose(0, 2), torch.randn(4, 9, 2).transpose(0, 2)
    assert torch.equal(linear_scan(a, b), linear_scan(a.contiguous(), b.contiguous()))


@pytest.mark.parametrize(
    ("a", "b", "h0", "message"),
    [
        ((2, 5, 3), (2, 5), None, "a has shape"),
        ((2, 4, 3), (2, 5, 3), None, "does not broadcast"),
        ((2, 5, 3), (2, 5, 3), (2, 4), r"expected \(2, 3\)"),
        ((2,), (2,), None, "axes b and l"),
        ((2, 0), (2, 0), None, "empty"),
    ],
)
def test_wrong_shapes(a, b, h0, message):
    with pytest.raises(ValueError, match=message):
        unchecked(linear_scan)(torch.zeros(a), torch.zeros(b), h0=None if h0 is None else torch.zeros(h0))
