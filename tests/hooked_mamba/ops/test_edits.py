"""Edits of the state on the way, and the cutting of sequences that they rest on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mamba.ops import StateEdits, selective_scan, ssd
from tests.hooked_mamba.ops.cases import (
    SELECTIVE_BACKENDS,
    SSD_BACKENDS,
    assert_agrees,
    random_edits,
    selective_inputs,
    ssd_inputs,
)

LENGTH = 37
WHERE = {"first": [0], "last": [LENGTH - 1], "adjacent": [4, 5, 6], "spread": [0, 9, LENGTH - 1]}
CASES = [(selective_scan, *case) for case in SELECTIVE_BACKENDS] + [(ssd, *case) for case in SSD_BACKENDS]
each_op = pytest.mark.parametrize(("op", "backend", "dtype"), CASES)


def _inputs(op, b=2, l=LENGTH, seed=0):
    return selective_inputs(b, l, 17, 3, seed) if op is selective_scan else ssd_inputs(b, l, 4, 3, 2, 5, seed)


@each_op
@pytest.mark.parametrize("kind", ["scale", "add", "both"])
@pytest.mark.parametrize("where", WHERE)
def test_agrees_with_the_loop(kind, where, op, backend, dtype):
    inputs = _inputs(op)
    edits = random_edits(WHERE[where], kind, inputs)
    assert_agrees(op, inputs, dtype, backend, edits=edits, states_at=[0, 5, 6, 20, LENGTH - 1])


@each_op
def test_a_single_position(op, backend, dtype):
    inputs = _inputs(op, l=1)
    assert_agrees(op, inputs, dtype, backend, edits=random_edits([0], "both", inputs), states_at="all")


@each_op
def test_edits_broadcast(op, backend, dtype):
    inputs = _inputs(op)
    axes = inputs["h0"].ndim - 1
    edits = StateEdits([3, 8], torch.tensor(0.5), torch.full((2, *(1,) * axes), 2.0))
    assert_agrees(op, inputs, dtype, backend, edits=edits, states_at=[8])


@each_op
def test_a_state_set_to_zero_forgets(op, backend, dtype):
    inputs = {k: v.to(dtype) for k, v in _inputs(op).items()}
    out = op(**inputs, edits=StateEdits([11], scale=torch.zeros(())), backend=backend, states_at=[11])
    after = {k: v[:, 12:] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items() if k != "h0"}
    assert out.states.abs().max() == 0
    assert torch.allclose(out.y[:, 12:], op(**after, backend=backend).y, atol=1e-5)


@each_op
@pytest.mark.parametrize("at", [1, 16, 63, 64, 70, 129])
def test_what_comes_before_an_edit_keeps_every_bit(at, op, backend, dtype):
    inputs = {k: v.to(dtype) for k, v in _inputs(op, l=130).items()}
    states_at = sorted({0, at - 1, at})
    plain = op(**inputs, backend=backend, states_at=states_at)
    edits = StateEdits([at], add=torch.ones(()))
    edited = op(**inputs, backend=backend, states_at=states_at, edits=edits)
    assert torch.equal(edited.y[:, :at], plain.y[:, :at])
    assert torch.equal(edited.states[:, :-1], plain.states[:, :-1])
    assert (edited.y[:, at] != plain.y[:, at]).any()


@each_op
def test_the_future_does_not_reach_back(op, backend, dtype):
    inputs = {k: v.to(dtype) for k, v in _inputs(op, l=130).items()}
    changed = {k: v.clone() for k, v in inputs.items()}
    for name in ("x", "dt", "B", "C"):
        changed[name][:, 70:] *= 0.5
    before, after = (op(**arguments, backend=backend).y for arguments in (inputs, changed))
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


@each_op
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_in_pieces_equals_whole(op, backend, dtype, data):
    length = data.draw(st.integers(2, 90), "length")
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4), "cuts"))
    inputs = {k: v.to(dtype).requires_grad_() for k, v in _inputs(op, 1, length, seed=length).items()}
    whole = op(**inputs, backend=backend)
    h, ys = inputs["h0"], []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        piece = {k: v[:, start:stop] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        y, h, _ = op(**(piece | {"h0": h}), backend=backend)
        ys.append(y)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    pieces = torch.cat(ys, 1)
    assert torch.allclose(pieces, whole.y, rtol=tolerance, atol=tolerance * whole.y.abs().max().item())
    grads = [
        torch.autograd.grad((o.cos().sum() + s.sin().sum()), list(inputs.values()))
        for o, s in ((whole.y, whole.h_last), (pieces, h))
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=10 * tolerance, atol=10 * tolerance * one.abs().max().item())


@pytest.mark.parametrize("op", [selective_scan, ssd])
@pytest.mark.parametrize("kind", ["scale", "add", "both"])
def test_gradcheck(op, kind):
    inputs = selective_inputs(1, 4, 2, 2) if op is selective_scan else ssd_inputs(1, 4, 2, 2, 1, 2)
    edits = random_edits([0, 2], kind, inputs)
    changes = {k: v.double() for k, v in edits._asdict().items() if k != "at" and v is not None}
    leaves = {k: v.requires_grad_() for k, v in (inputs | changes).items()}

    def scan(*tensors):
        arguments = dict(zip(leaves, tensors, strict=True))
        edits = StateEdits([0, 2], arguments.pop("scale", None), arguments.pop("add", None))
        return tuple(op(**arguments, edits=edits, states_at=[0, 1], backend="torch"))

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))
