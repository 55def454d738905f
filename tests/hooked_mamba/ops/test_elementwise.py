"""SiLU, softplus, the convolution and the scan between softplus and gate: every backend against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.ops import numba_compile

FUNCTIONS = {"silu": (ops.silu, F.silu), "softplus": (ops.softplus, F.softplus)}
BIG = 2**13
"""Numbers from which numba is taken."""


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of every size that matters, both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-4, 1.8, generator=generator)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 211, 41), (BIG // 16, 16), (3, 5, 17, 33)])
def test_values_relative_to_float64(name, shape):
    ours, theirs = FUNCTIONS[name]
    x = spread(*shape)
    expected = theirs(x.double())
    error = (ours(x, backend="numba") - expected).abs() / expected.abs().clamp_min(1e-25)  # below, silu may be e^-88 x
    assert error.max() < 1e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strided_inputs_give_the_same_bits(name):
    ours, _ = FUNCTIONS[name]
    wide = spread(2, 40, 300)
    for view in (wide[..., 130:], wide[:, 5:, 3:140], wide.transpose(0, 1), wide[..., ::2]):
        out = ours(view, backend="numba")
        assert torch.equal(out, ours(view.contiguous(), backend="numba"))
        assert out.shape == view.shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_number_stays_so(name):
    ours, theirs = FUNCTIONS[name]
    x = torch.tensor([float("nan"), float("inf"), 0.0, -200.0, 200.0, 1.0]).repeat(BIG // 4).view(-1, 24)
    torch.testing.assert_close(ours(x, backend="numba"), theirs(x), equal_nan=True, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name):
    ours, theirs = FUNCTIONS[name]
    x = spread(4, 40, 64).requires_grad_()
    weights = spread(4, 40, 64, seed=1)
    (ours(x, backend="numba") * weights).sum().backward()
    exact = x.detach().double().requires_grad_()
    (theirs(exact) * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("x", [torch.ones(7, 3), torch.ones(BIG, 8), torch.ones(2, BIG).bfloat16()])
def test_torch_does_what_numba_gains_nothing_at(name, x):
    ours, theirs = FUNCTIONS[name]
    assert torch.equal(ours(x, backend="numba"), theirs(x))


def test_numba_says_why_it_refuses():
    with pytest.raises(RuntimeError, match="silu: backend is 'numba', but it computes in float32 and x is float64"):
        ops.silu(torch.zeros(3).double(), backend="numba")


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, silu: bool) -> Tensor:
    """The definition, one tap and position at a time."""
    x = x if history is None else torch.cat([history, x], 1)
    taps = weight.shape[-1]
    rows = []
    for t in range(x.shape[1] - taps + 1):
        row = sum(weight[:, 0, k] * x[:, t + k] for k in range(taps))
        rows.append(row if bias is None else row + bias)
    out = torch.stack(rows, 1)
    return out * torch.sigmoid(out) if silu else out


CONVOLUTIONS = list(itertools.product(("torch", "numba"), (1, 2, 4, 5), (False, True), (False, True), (0, 3)))


@pytest.mark.parametrize(("backend", "taps", "with_bias", "silu", "before"), CONVOLUTIONS)
def test_convolution(backend, taps, with_bias, silu, before):
    b, l, c = 2, 130, 37
    x = spread(b, l, 3 * c).clamp(-9, 9)[..., c : 2 * c].requires_grad_()  # rows that lie apart
    weight = torch.randn(c, 1, taps, generator=torch.Generator().manual_seed(2)).requires_grad_()
    bias = torch.linspace(-1, 1, c).requires_grad_() if with_bias else None
    history = spread(b, before, c, seed=3).clamp(-9, 9).requires_grad_() if before else None
    leaves = [t for t in (x, weight, bias, history) if t is not None]
    out = ops.causal_conv1d(x, weight, bias, history=history, silu=silu, backend=backend)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, history)]
    expected = convolved(*exact, silu)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weights = spread(*out.shape, seed=4).clamp(-3, 3)
    found = torch.autograd.grad(out, leaves, weights)
    true = torch.autograd.grad(expected, [t for t in exact if t is not None], weights.double())
    for gradient, expected_gradient in zip(found, true, strict=True):
        scale = expected_gradient.abs().max()
        torch.testing.assert_close(gradient.double() / scale, expected_gradient / scale, rtol=1e-5, atol=1e-6)


def test_silu_in_the_same_pass_changes_no_bit():
    x, weight = spread(2, 150, 48), torch.randn(48, 1, 4, generator=torch.Generator().manual_seed(0))
    for backend in ("torch", "numba"):
        plain = ops.causal_conv1d(x, weight, None, backend=backend)
        assert torch.equal(
            ops.causal_conv1d(x, weight, None, silu=True, backend=backend), ops.silu(plain, backend=backend)
        )


def gated_inputs(b: int, l: int, E: int, N: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(b, l, E), "dt_pre": normal(b, l, E) - 2, "A": -torch.rand(E, N, generator=generator) * 4,
        "B": normal(b, l, N), "C": normal(b, l, N), "D": normal(E), "z": normal(b, l, 2 * E)[..., E:],
        "h0": normal(b, E, N),
    }  # fmt: skip


@pytest.mark.parametrize(("b", "l", "E", "N"), [(2, 37, 192, 16), (1, 1, 48, 5), (3, 16, 176, 1), (1, 300, 32, 7)])
def test_the_scan_between_softplus_and_gate(b, l, E, N):
    inputs = gated_inputs(b, l, E, N)
    y, h = ops.gated_scan(**inputs)
    exact, exact_h = ops.gated_scan(**{k: v.double() for k, v in inputs.items()}, backend="naive")
    torch.testing.assert_close(y.double() / exact.abs().max(), exact / exact.abs().max(), rtol=0, atol=2e-6)
    torch.testing.assert_close(h.double(), exact_h, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_pass_gives_the_bits_of_the_single_steps(threads, monkeypatch):
    """Else a hook on hook_gate would change the logits, be it by a rounding."""
    monkeypatch.setattr(numba_compile, "WORTH_A_THREAD", 1)
    torch.set_num_threads(threads)
    inputs = gated_inputs(2, 83, 192, 16)
    y, h = ops.gated_scan(**inputs, backend="numba")
    dt = ops.softplus(inputs["dt_pre"])
    scan = ops.selective_scan(*(inputs["x"], dt, inputs["A"], inputs["B"], inputs["C"]), h0=inputs["h0"])
    steps = (scan.y + inputs["D"] * inputs["x"]) * ops.silu(inputs["z"])
    assert torch.equal(y, steps)
    assert torch.equal(h, scan.h_last)


def test_gradients_go_through_the_single_steps():
    inputs = {k: v.double().requires_grad_() for k, v in gated_inputs(1, 5, 4, 3).items()}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_scan(*tensors)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_convolution_at_one_position(backend, silu, with_bias):
    x, weight, bias = spread(3, 4, 21), spread(21, 1, 4, seed=1), spread(21, seed=2)
    given = bias if with_bias else None
    with torch.no_grad():
        out = ops.causal_conv1d(x, weight, given, silu=silu, backend=backend)
    exact = (x.double() * weight[:, 0].t().double()).sum(1, keepdim=True) + (bias.double() if with_bias else 0)
    exact = F.silu(exact) if silu else exact
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)
