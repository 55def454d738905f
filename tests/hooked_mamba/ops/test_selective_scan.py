"""The Mamba-1 scan: every backend against the naive loop in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mamba.ops import selective_scan
from tests.hooked_mamba.ops.cases import (
    SELECTIVE_BACKENDS,
    assert_agrees,
    assert_close,
    lengths,
    outcome,
    selective_inputs,
    sizes,
    some_positions,
)

SHAPES = [
    (1, 1, 5, 3),
    (3, 1, 17, 16),
    (1, 2, 1, 1),
    (3, 3, 5, 16),
    (1, 7, 17, 3),
    (1, 63, 70, 1),
    (3, 64, 5, 3),
    (1, 65, 17, 16),
    (2, 130, 70, 16),
]
each_backend = pytest.mark.parametrize(("backend", "dtype"), SELECTIVE_BACKENDS)


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", [None, "several"])
def test_agrees_with_the_loop(shape, states, backend, dtype):
    assert_agrees(
        selective_scan,
        selective_inputs(*shape),
        dtype,
        backend,
        states_at=some_positions(states, shape[1]),
    )


@each_backend
@given(
    shape=st.tuples(sizes(3), lengths(), sizes(70), sizes(16)),
    states=st.sampled_from([None, "one", "several", "all", "last"]),
    leave_out=st.sampled_from([(), ("h0",), ("D",), ("D", "h0")]),
    seed=st.integers(0, 9),
)
def test_sweep(shape, states, leave_out, seed, backend, dtype):
    inputs, states_at = selective_inputs(*shape, seed=seed), some_positions(states, shape[1])
    assert_agrees(selective_scan, inputs, dtype, backend, leave_out=leave_out, states_at=states_at)


@each_backend
@pytest.mark.parametrize("outputs", [("y",), ("h_last",), ("states",), ("y", "states")])
@pytest.mark.parametrize("states", ["several", "all"])
def test_gradients_of_each_output_alone(outputs, states, backend, dtype):
    inputs, states_at = selective_inputs(2, 19, 6, 4), some_positions(states, 19)
    assert_agrees(selective_scan, inputs, dtype, backend, outputs=outputs, states_at=states_at)


@each_backend
@pytest.mark.parametrize("wanted", ["x", "dt", "A", "B", "C", "D", "h0"])
def test_gradient_to_each_input_alone(wanted, backend, dtype):
    inputs = selective_inputs(2, 19, 6, 4)

    def grad(backend, dtype):
        arguments = {k: v.to(dtype).requires_grad_(k == wanted) for k, v in inputs.items()}
        y = selective_scan(**arguments, backend=backend).y
        return {"grad": torch.autograd.grad(y.cos().sum(), arguments[wanted])[0]}

    assert_close(grad(backend, dtype), grad("naive", torch.float64), 1e-12 if backend == "naive" else 4e-6)


@pytest.mark.parametrize("states_at", [None, [1], "all"])
def test_gradcheck(states_at):
    inputs = {k: v.requires_grad_() for k, v in selective_inputs(2, 3, 2, 2).items()}

    def scan(*tensors):
        out = selective_scan(**dict(zip(inputs, tensors, strict=True)), states_at=states_at, backend="torch")
        return tuple(t for t in out if t is not None)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@each_backend
@pytest.mark.parametrize("l", [1, 40])
def test_frozen_is_the_gradient_with_constants(l, backend, dtype):
    inputs, states_at = selective_inputs(2, l, 18, 3), sorted({0, l // 2, l - 1})
    full = outcome(selective_scan, inputs, torch.float64, "naive", states_at=states_at)
    frozen = outcome(selective_scan, inputs, dtype, backend, states_at=states_at, frozen=True)
    for name in ("dt", "A", "B", "C", "D"):
        assert frozen.pop(f"to {name}").abs().max() == 0
        full.pop(f"to {name}")
    assert_close(frozen, full, 4e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("l", [1, 33])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(half, l, backend):
    inputs = {k: v.float() for k, v in selective_inputs(2, l, 17, 4).items()}
    rounded = {k: inputs[k].to(half) for k in ("x", "B", "C")}
    got = selective_scan(**(inputs | rounded), states_at="all", backend=backend)
    in_float32 = {k: v.float() for k, v in (inputs | rounded).items()}
    expected = selective_scan(**in_float32, states_at="all", backend=backend)
    assert got.y.dtype == half
    assert got.h_last.dtype == got.states.dtype == torch.float32
    assert torch.equal(got.y, expected.y.to(half))
    assert torch.equal(got.states, expected.states)


@each_backend
@pytest.mark.parametrize("padding", [slice(0, 20), slice(9, 30), slice(25, 40)])
def test_a_step_of_zero_keeps_the_state_bit_for_bit(padding, backend, dtype):
    inputs = {k: v.to(dtype) for k, v in selective_inputs(2, 40, 17, 3).items()}
    inputs["dt"][:, padding] = 0
    out = selective_scan(**inputs, states_at="all", backend=backend)
    before = out.states[:, padding.start - 1] if padding.start else inputs["h0"]
    assert torch.equal(out.states[:, padding], before.unsqueeze(1).expand_as(out.states[:, padding]))
    if padding.stop == 40:
        assert torch.equal(out.h_last, before)


@each_backend
def test_huge_steps_forget_and_stay_finite(backend, dtype):
    inputs = selective_inputs(1, 20, 5, 3)
    inputs["dt"] = inputs["dt"] * 1e4
    assert_agrees(selective_scan, inputs, dtype, backend, states_at=[3, 19])


@each_backend
def test_inputs_need_not_be_contiguous(backend, dtype):
    inputs = {k: v.to(dtype) for k, v in selective_inputs(2, 33, 20, 4).items()}
    inputs["B"] = inputs["B"][:, :1].expand(2, 33, 4)
    odd = dict(inputs)
    odd["x"] = torch.cat([inputs["x"], inputs["dt"]], -1)[..., :20]
    odd["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["A"] = inputs["A"].t().contiguous().t()
    odd["C"] = inputs["C"].transpose(0, 1).contiguous().transpose(0, 1)
    odd["h0"] = inputs["h0"].transpose(1, 2).contiguous().transpose(1, 2)
    straight = {k: v.contiguous() for k, v in inputs.items()}
    assert not any(odd[k].is_contiguous() for k in ("x", "dt", "A", "B", "C", "h0"))
    got = outcome(selective_scan, odd, dtype, backend, states_at=[5])
    expected = outcome(selective_scan, straight, dtype, backend, states_at=[5])
    assert_close(got, expected, 1e-6)


@each_backend
def test_inputs_are_left_as_they_are(backend, dtype):
    inputs = {k: v.to(dtype) for k, v in selective_inputs(2, 33, 20, 4).items()}
    copies = {k: v.clone() for k, v in inputs.items()}
    outcome(selective_scan, inputs, dtype, backend, states_at="all")
    assert all(torch.equal(inputs[k], copies[k]) for k in inputs)


def test_a_second_derivative_is_refused():
    inputs = {k: v.requires_grad_() for k, v in selective_inputs(1, 4, 2, 2).items()}
    y = selective_scan(**inputs, backend="torch").y
    (grad,) = torch.autograd.grad(y.cos().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
