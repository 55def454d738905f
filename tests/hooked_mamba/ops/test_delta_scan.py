"""The scan of the delta rule: the loop against the equations, and every backend against the loop."""

from __future__ import annotations

from inspect import unwrap as unchecked

import pytest
import torch
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.ops import StateEdits, delta_rows, delta_scan, numba_compile
from tests.hooked_mamba.ops.cases import TOLERANCE, assert_agrees, assert_close, outcome, random_edits, some_positions
from tests.hooked_mamba.ops.delta_cases import OUTPUTS, delta_inputs, dense_rows, plain_loop

BACKENDS = [("torch", torch.float64), ("torch", torch.float32), ("numba", torch.float32)]
SHAPES = [(2, 1, 2, 4, 3), (1, 3, 3, 5, 7), (2, 33, 2, 16, 40), (1, 70, 1, 24, 16)]
each_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
each_decay = pytest.mark.parametrize("per", ["key", "head", "multiple"])


@each_decay
@pytest.mark.parametrize("shape", [(2, 1, 2, 4, 3), (2, 5, 2, 3, 4)])
@pytest.mark.parametrize("edited", [False, True])
def test_the_loop_follows_the_equations(shape, per, edited):
    inputs = delta_inputs(*shape, per)
    edits = random_edits([0, shape[1] - 1][: shape[1]], "both", inputs) if edited else None
    edits = None if edits is None else StateEdits(edits.at, edits.scale.double(), edits.add.double())
    found = outcome(delta_scan, inputs, torch.float64, "naive", states_at="all", edits=edits, outputs=OUTPUTS)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    if edits is not None:
        leaves |= {"scale": edits.scale.clone().requires_grad_(), "add": edits.add.clone().requires_grad_()}
    changed = None if edits is None else StateEdits(edits.at, leaves["scale"], leaves["add"])
    out = plain_loop(**{name: leaves[name] for name in inputs}, edits=changed)
    random = torch.Generator().manual_seed(7)
    loss = sum((out[name] * torch.randn(out[name].shape, generator=random)).sum() for name in OUTPUTS)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    expected = {k: v.detach() for k, v in out.items()} | {f"to {n}": g for n, g in zip(leaves, grads, strict=True)}
    assert_close(found, expected, 1e-12)


@each_backend
@each_decay
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_loop(shape, per, backend, dtype):
    assert_agrees(delta_scan, delta_inputs(*shape, per), dtype, backend, outputs=OUTPUTS)


@each_backend
@pytest.mark.parametrize("leave_out", [(), ("h0",)])
@pytest.mark.parametrize("states", ["one", "several", "all", "last"])
def test_states(states, leave_out, backend, dtype):
    inputs, states_at = delta_inputs(1, 70, 2, 6, 20), some_positions(states, 70)
    assert_agrees(delta_scan, inputs, dtype, backend, states_at=states_at, leave_out=leave_out, outputs=OUTPUTS)


@each_backend
@pytest.mark.parametrize("kind", ["scale", "add", "both"])
@pytest.mark.parametrize("at", [[0], [2, 3, 32], [32]])
def test_edits(at, kind, backend, dtype):
    inputs = delta_inputs(2, 33, 2, 5, 6)
    edits = random_edits(at, kind, inputs)
    assert_agrees(delta_scan, inputs, dtype, backend, edits=edits, states_at=[2, 20, 32], outputs=OUTPUTS)


@each_backend
@each_decay
@pytest.mark.parametrize("decay", [0.0, -0.7, 1e-6])
def test_any_decay(decay, per, backend, dtype):
    """Edited decays, and ones so strong that chunks cannot divide by them."""
    inputs = delta_inputs(1, 33, 2, 5, 6, per)
    inputs["w"][:, ::2] = float(torch.tensor(decay))
    assert_agrees(delta_scan, inputs, dtype, backend, outputs=OUTPUTS)
    assert_agrees(delta_scan, inputs, dtype, backend, outputs=OUTPUTS, frozen=True)


@each_backend
@pytest.mark.parametrize("lengths", [[1] * 9, [3, 1, 33, 33]])
def test_pieces_are_the_whole(lengths, backend, dtype):
    inputs = {name: value.to(dtype) for name, value in delta_inputs(2, sum(lengths), 2, 16, 20).items()}
    whole = delta_scan(**inputs, backend=backend)
    h, ys, recalls = inputs.pop("h0"), [], []
    for piece in zip(*(value.split(lengths, 1) for value in inputs.values()), strict=True):
        y, h, _, recall = delta_scan(*piece, h0=h, backend=backend)
        ys.append(y)
        recalls.append(recall)
    bound = 0 if backend == "numba" else 10 * TOLERANCE[dtype]
    for got, expected in ((torch.cat(ys, 1), whole.y), (h, whole.h_last), (torch.cat(recalls, 1), whole.recall)):
        assert (got - expected).abs().max() <= bound


@each_backend
@each_decay
@pytest.mark.parametrize("l", [1, 33])
@pytest.mark.parametrize("start", [True, False])
def test_frozen(l, start, per, backend, dtype):
    """The gradients to v and h0 are those of the whole backward; nothing else gets one."""
    inputs = delta_inputs(2, l, 2, 5, 6, per)
    leave_out = () if start else ("h0",)
    for outputs in (("y",), ("y", "h_last"), OUTPUTS):
        options = {"states_at": [0], "leave_out": leave_out, "outputs": outputs}
        whole = outcome(delta_scan, inputs, torch.float64, "naive", **options)
        frozen = outcome(delta_scan, inputs, dtype, backend, frozen=True, **options)
        for name in ("r", "w", "k", "a", "b"):
            assert not frozen.pop(f"to {name}").any()
        assert_close(frozen, {name: whole[name] for name in frozen}, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["naive", "torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype, backend):
    inputs = {name: value.to(dtype) for name, value in delta_inputs(1, 33, 2, 5, 6).items()}
    found = delta_scan(**inputs, states_at=[3], backend=backend)
    exact = delta_scan(**{name: value.float() for name, value in inputs.items()}, states_at=[3], backend=backend)
    assert found.y.dtype == found.recall.dtype == dtype
    assert found.h_last.dtype == found.states.dtype == torch.float32
    assert torch.equal(found.y, exact.y.to(dtype))
    assert torch.equal(found.recall, exact.recall.to(dtype))
    assert torch.equal(found.h_last, exact.h_last)


def unit(t: Tensor) -> Tensor:
    return torch.nn.functional.normalize(t, dim=-1)


def test_the_published_recurrences():
    """RWKV-7, gated DeltaNet and Kimi Delta Attention, each from its own equation, a position at a time."""
    random = torch.Generator().manual_seed(0)
    l, K, V = 7, 4, 3
    r, kappa, k = (torch.randn(l, K, generator=random).double() for _ in range(3))
    v = torch.randn(l, V, generator=random).double()
    kappa, k = unit(kappa), unit(k)
    w, rate = (torch.rand(l, K, generator=random).double() for _ in range(2))
    alpha, beta = (torch.rand(l, 1, generator=random).double() for _ in range(2))
    eye = torch.eye(K).double()

    def rwkv7(S, t):
        return S @ (torch.diag(w[t]) - torch.outer(kappa[t], rate[t] * kappa[t])) + torch.outer(v[t], k[t])

    def gated_deltanet(S, t):
        return alpha[t] * S @ (eye - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])

    def kda(S, t):
        return S @ torch.diag(w[t]) @ (eye - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])

    for step, arguments in (
        (rwkv7, (r, w, k, v, kappa, -rate * kappa)),
        (gated_deltanet, (r, alpha, k, beta * v, k, -alpha * beta)),
        (kda, (r, w, k, beta * v, w * k, -beta * k)),
    ):
        S, expected = torch.zeros(V, K).double(), []
        for t in range(l):
            S = step(S, t)
            expected.append(S @ r[t])
        y = delta_scan(*(t[None, :, None] for t in arguments)).y[0, :, 0]
        assert (y - torch.stack(expected)).abs().max() < 1e-12, step.__name__


@pytest.mark.parametrize("backend", ["naive", "torch", "numba"])
def test_padding_keeps_the_state(backend):
    inputs = {name: value.float() for name, value in delta_inputs(1, 5, 2, 16, 16).items()}
    inputs["w"][:], inputs["k"][:], inputs["b"][:] = 1, 0, 0
    if backend == "torch":  # there the state passes through sums of products with zeros
        assert torch.allclose(delta_scan(**inputs, backend=backend).h_last, inputs["h0"], rtol=1e-6)
    else:
        assert torch.equal(delta_scan(**inputs, backend=backend).h_last, inputs["h0"])


@each_backend
@each_decay
@pytest.mark.parametrize("queries", [[0], [2, 8], range(9)])
def test_rows_are_those_of_the_dense_matrix(queries, per, backend, dtype):
    inputs = delta_inputs(2, 9, 2, 5, 6, per)
    v, _ = inputs.pop("v"), inputs.pop("h0")
    alpha = delta_rows(**{name: value.to(dtype) for name, value in inputs.items()}, queries=queries, backend=backend)
    dense = dense_rows(**inputs)
    assert (alpha.double() - dense[:, list(queries)]).abs().max() < 10 * TOLERANCE[dtype]
    y = torch.einsum("bqhs,bshv->bqhv", alpha.double(), v)
    assert (y - plain_loop(**inputs, v=v, h0=None)["y"][:, list(queries)]).abs().max() < 20 * TOLERANCE[dtype]


def test_rows_without_queries_and_wrong_ones():
    inputs = delta_inputs(1, 4, 2, 3, 3)
    names = ("r", "w", "k", "a", "b")
    assert delta_rows(*(inputs[n] for n in names), queries=[]).shape == (1, 0, 2, 4)
    with pytest.raises(ValueError, match=r"delta_rows: queries\[0\] is 4"):
        delta_rows(*(inputs[n] for n in names), queries=[4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(1, 2, 3, 2)}, r"w has shape \(1, 2, 3, 2\), expected \(b=1, l=2, H=3, K=4\)"),
        ({"k": torch.zeros(1, 2, 3, 5)}, "k has shape"),
        ({"a": torch.zeros(1, 2, 1, 4)}, "a has shape"),
        ({"v": torch.zeros(1, 3, 3, 5)}, "v has shape"),
        ({"h0": torch.zeros(1, 3, 4, 5)}, r"h0 has shape \(1, 3, 4, 5\), expected \(b=1, H=3, V=5, K=4\)"),
        ({"states_at": [2]}, r"states_at\[0\] is 2"),
        ({"edits": StateEdits([0], torch.ones(1, 1, 3, 4, 5))}, "edits.scale has shape"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        unchecked(delta_scan)(**({k: v.float() for k, v in delta_inputs(1, 2, 3, 4, 5).items()} | change))


def test_numba_is_chosen_and_threads_change_no_bit(monkeypatch):
    inputs = {name: value.float() for name, value in delta_inputs(2, 40, 3, 16, 40).items()}
    assert ops.choose("delta_scan", inputs["v"]).name == "numba"
    alone = outcome(delta_scan, inputs, torch.float32, "numba", states_at=[3, 39], outputs=OUTPUTS)
    monkeypatch.setattr(numba_compile, "WORTH_A_THREAD", 1)
    torch.set_num_threads(3)
    shared = outcome(delta_scan, inputs, torch.float32, "numba", states_at=[3, 39], outputs=OUTPUTS)
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
