"""The Mamba-2 scan: the chunked form against the naive loop in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mamba.ops import ssd
from tests.hooked_mamba.ops.cases import (
    SSD_BACKENDS,
    assert_agrees,
    assert_close,
    lengths,
    outcome,
    sizes,
    some_positions,
    ssd_inputs,
)

SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 1, 4, 5, 2, 3),
    (1, 2, 2, 5, 1, 3),
    (3, 3, 4, 1, 4, 16),
    (1, 7, 6, 5, 3, 3),
    (2, 63, 2, 1, 1, 16),
    (1, 64, 4, 5, 2, 3),
    (2, 65, 4, 5, 2, 16),
    (1, 130, 3, 4, 1, 5),
]
each_backend = pytest.mark.parametrize(("backend", "dtype"), SSD_BACKENDS)


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", [None, "several"])
@pytest.mark.parametrize("chunk", [16, 64])
def test_agrees_with_the_loop(shape, states, chunk, backend, dtype):
    states_at = some_positions(states, shape[1])
    assert_agrees(ssd, ssd_inputs(*shape), dtype, backend, chunk=chunk, states_at=states_at)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("leave_out", [(), ("h0",), ("D",)])
@pytest.mark.parametrize("shape", [(2, 1, 6, 5, 3, 32), (1, 1, 4, 1, 1, 16), (1, 1, 4, 3, 2, 7)])
def test_a_step_without_gradients(shape, leave_out, backend):
    inputs = {name: t for name, t in ssd_inputs(*shape).items() if name not in leave_out}
    with torch.no_grad():
        exact = ssd(**inputs, backend="naive", states_at="all")
        found = ssd(**{name: t.float() for name, t in inputs.items()}, backend=backend, states_at="all")
    for mine, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=4e-6, atol=4e-6)


@each_backend
@given(
    shape=st.tuples(sizes(3), lengths()),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 6), (6, 3), (5, 1)]),
    state=st.tuples(sizes(5), sizes(16)),
    states=st.sampled_from([None, "one", "several", "all", "last", "most"]),
    leave_out=st.sampled_from([(), ("h0",), ("D",), ("D", "h0")]),
    chunk=st.sampled_from([1, 8, 16, 64, 256]),
    seed=st.integers(0, 9),
)
def test_sweep(shape, heads, state, states, leave_out, chunk, seed, backend, dtype):
    (H, G), (P, N) = heads, state
    inputs, states_at = ssd_inputs(*shape, H, P, G, N, seed=seed), some_positions(states, shape[1])
    assert_agrees(ssd, inputs, dtype, backend, leave_out=leave_out, states_at=states_at, chunk=chunk)


@each_backend
@pytest.mark.parametrize("outputs", [("y",), ("h_last",), ("states",), ("y", "states")])
@pytest.mark.parametrize("states", ["several", "all"])
def test_gradients_of_each_output_alone(outputs, states, backend, dtype):
    states_at = some_positions(states, 19)
    assert_agrees(ssd, ssd_inputs(2, 19, 4, 3, 2, 4), dtype, backend, outputs=outputs, states_at=states_at, chunk=8)


@each_backend
@pytest.mark.parametrize("wanted", ["x", "dt", "A", "B", "C", "D", "h0"])
def test_gradient_to_each_input_alone(wanted, backend, dtype):
    inputs = ssd_inputs(2, 19, 4, 3, 2, 4)

    def grad(backend, dtype):
        arguments = {k: v.to(dtype).requires_grad_(k == wanted) for k, v in inputs.items()}
        y = ssd(**arguments, backend=backend, chunk=8).y
        return {"grad": torch.autograd.grad(y.cos().sum(), arguments[wanted])[0]}

    assert_close(grad(backend, dtype), grad("naive", torch.float64), 4e-6)


@pytest.mark.parametrize("states_at", [None, [1, 3], "all"])
def test_gradcheck(states_at):
    inputs = {k: v.requires_grad_() for k, v in ssd_inputs(1, 5, 2, 2, 1, 2).items()}

    def scan(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        out = ssd(**arguments, states_at=states_at, backend="torch", chunk=2)
        return tuple(t for t in out if t is not None)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@each_backend
@pytest.mark.parametrize("l", [1, 40])
@pytest.mark.parametrize("with_states", [True, False])
def test_frozen_is_the_gradient_with_constants(l, with_states, backend, dtype):
    inputs, states_at = ssd_inputs(2, l, 4, 3, 2, 3), sorted({0, l // 2, l - 1}) if with_states else None
    full = outcome(ssd, inputs, torch.float64, "naive", states_at=states_at)
    frozen = outcome(ssd, inputs, dtype, backend, states_at=states_at, frozen=True, chunk=16)
    for name in ("dt", "A", "B", "C", "D"):
        assert frozen.pop(f"to {name}").abs().max() == 0
        full.pop(f"to {name}")
    assert_close(frozen, full, 4e-6)


@pytest.mark.parametrize("l", [1, 33])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(half, l):
    inputs = {k: v.float() for k, v in ssd_inputs(2, l, 4, 3, 2, 4).items()}
    rounded = {k: inputs[k].to(half) for k in ("x", "B", "C")}
    got = ssd(**(inputs | rounded), states_at=[0], backend="torch")
    expected = ssd(**{k: v.float() for k, v in (inputs | rounded).items()}, states_at=[0], backend="torch")
    assert got.y.dtype == half
    assert got.h_last.dtype == got.states.dtype == torch.float32
    assert torch.equal(got.y, expected.y.to(half))
    assert torch.equal(got.h_last, expected.h_last)


@each_backend
@pytest.mark.parametrize("padding", [slice(0, 20), slice(9, 30), slice(25, 40)])
@pytest.mark.parametrize("states_at", [[*range(0, 40, 3)], "all"])
def test_a_step_of_zero_keeps_the_state_bit_for_bit(padding, states_at, backend, dtype):
    inputs = {k: v.to(dtype) for k, v in ssd_inputs(2, 40, 4, 3, 2, 3).items()}
    inputs["dt"][:, padding] = 0
    out = ssd(**inputs, states_at=states_at, backend=backend, chunk=8)
    positions = range(40) if states_at == "all" else states_at
    # Every state inside the padding is the state before it (position padding.start - 1 or h0).
    inside = [s for s, p in enumerate(positions) if padding.start <= p < padding.stop]
    for s in inside[1:]:
        assert torch.equal(out.states[:, s], out.states[:, inside[0]])
    if padding.start == 0:
        assert torch.equal(out.states[:, inside[0]], inputs["h0"])


@each_backend
def test_padding_at_the_end_keeps_the_last_state(backend, dtype):
    inputs = {k: v.to(dtype) for k, v in ssd_inputs(2, 40, 4, 3, 2, 3).items()}
    inputs["dt"][:, 27:] = 0
    until = {k: v[:, :27] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    padded = ssd(**inputs, backend=backend, chunk=8)
    assert torch.equal(padded.h_last, ssd(**until, backend=backend, chunk=8).h_last)


@each_backend
def test_huge_steps_forget_and_stay_finite(backend, dtype):
    inputs = ssd_inputs(1, 40, 4, 3, 2, 3)
    inputs["dt"] = inputs["dt"] * 1e4
    assert_agrees(ssd, inputs, dtype, backend, states_at=[3, 39], chunk=16)


@each_backend
def test_inputs_need_not_be_contiguous(backend, dtype):
    inputs = {k: v.to(dtype) for k, v in ssd_inputs(2, 33, 4, 3, 2, 4).items()}
    odd = {
        k: v.transpose(0, -1).contiguous().transpose(0, -1) if v.ndim > 1 else torch.stack([v, v], -1)[:, 0]
        for k, v in inputs.items()
    }
    assert not any(v.is_contiguous() for v in odd.values())
    got = outcome(ssd, odd, dtype, backend, states_at=[5], chunk=8)
    assert_close(got, outcome(ssd, inputs, dtype, backend, states_at=[5], chunk=8), 1e-6)


def test_all_states_lie_on_the_path_of_the_outputs():
    inputs = ssd_inputs(2, 50, 4, 3, 2, 4)
    out = ssd(**inputs, states_at="all", backend="torch", chunk=16)
    C = inputs["C"].repeat_interleave(2, 2)
    read = (out.states * C.unsqueeze(-2)).sum(-1) + inputs["D"][:, None] * inputs["x"]
    assert torch.allclose(read, out.y, atol=1e-12)
    assert torch.allclose(out.states[:, -1], out.h_last, atol=1e-12)


@pytest.mark.parametrize("lengths", [[16, 33, 2], [5, 2, 44]])
def test_numba_gives_the_bits_of_the_whole_from_any_pieces(lengths):
    inputs = {k: v.float() for k, v in ssd_inputs(2, sum(lengths), 4, 20, 2, 18).items()}
    whole = ssd(**inputs, backend="numba", states_at="all")
    A, D, h = inputs["A"], inputs["D"], inputs["h0"]
    ys = []
    for x, dt, B, C in zip(*(inputs[k].split(lengths, 1) for k in ("x", "dt", "B", "C")), strict=True):
        y, h, _ = ssd(x, dt, A, B, C, D, h0=h, backend="numba")
        ys.append(y)
    assert torch.equal(torch.cat(ys, 1), whole.y)
    assert torch.equal(h, whole.h_last)
    assert torch.equal(h, whole.states[:, -1])


@pytest.mark.parametrize("threads", [1, 3])
def test_numba_gradients_do_not_depend_on_how_heads_are_shared_among_threads(threads, monkeypatch):
    from hooked_mamba.ops.ssd import numba as by_numba

    monkeypatch.setattr(by_numba, "threads_for", lambda units, work: min(threads, units))
    monkeypatch.setattr("hooked_mamba.ops.numba_compile.threads_for", lambda units, work: min(threads, units))
    assert_agrees(ssd, ssd_inputs(2, 75, 6, 20, 2, 33), torch.float32, "numba")  # three chunks; heads of a group parted
