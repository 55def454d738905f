"""The peer backend over mamba_ssm: layouts and refusals, with a stand-in for the package, which needs a GPU."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from hooked_mamba import ops
from hooked_mamba.ops import naive
from tests.hooked_mamba.ops.cases import selective_inputs, ssd_inputs
from tests.hooked_mamba.tiny import build


def scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """mamba_ssm's signature and layout: positions last."""
    assert u.is_contiguous()
    assert not delta_softplus
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
    out = naive.selective_scan(u, delta, A, B, C, D, h0=None, positions=None)
    return out.y.transpose(1, 2), out.h_last.detach()


def chunk_scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
    """mamba_ssm's signature."""
    assert chunk_size in (16, 32, 64, 128, 256)
    out = naive.ssd(x, dt, A, B, C, D, h0=initial_states, positions=None)
    return out.y, out.h_last


@pytest.fixture
def peer(monkeypatch):
    """The backend, over the stand-in."""
    for name, functions in {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": scan_fn},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": chunk_scan},
    }.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hooked_mamba.ops.mamba_ssm_scan", raising=False)
    yield importlib.import_module("hooked_mamba.ops.mamba_ssm_scan")
    sys.modules.pop("hooked_mamba.ops.mamba_ssm_scan", None)


def test_selective_scan_turns_the_layout(peer):
    inputs = {k: v.float() for k, v in selective_inputs(2, 7, 5, 4).items() if k != "h0"}
    inputs["x"].requires_grad_()
    found = peer.selective_scan(**inputs, h0=None, positions=None)
    expected = ops.selective_scan(**inputs, backend="naive")
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.h_last, expected.h_last)
    found.y.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient of the last state"):
        peer.selective_scan(**inputs, h0=None, positions=None).h_last.sum().backward()


def test_ssd(peer):
    inputs = {k: v.float() for k, v in ssd_inputs(2, 7, 4, 3, 2, 5).items()}
    found = peer.ssd(**inputs, positions=None, chunk=40)
    expected = ops.ssd(**inputs, backend="naive")
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.h_last, expected.h_last)


def test_refuses_what_its_kernels_cannot_do(peer):
    x = torch.zeros(1, 2, 3)
    assert "needs a GPU" in peer.why_not("selective_scan", x, 16, frozenset())
    inputs = {k: v.float() for k, v in selective_inputs(1, 3, 2, 2).items()}
    with pytest.raises(ValueError, match="no initial state"):
        peer.selective_scan(**inputs, positions=None)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@torch.no_grad()
def test_whole_models_run_on_it(peer, monkeypatch, family):
    """A model that starts from nothing must not pass a state of zeros: Mamba-1's kernel takes none."""
    model, tokens = build(family), torch.arange(14).reshape(2, 7)
    expected = model(tokens)
    on_gpu = peer.why_not

    def why_not(op, x, N, asked):
        reason = on_gpu(op, x, N, asked)
        return "h0" if "h0" in asked and family == "mamba" else None if "needs a GPU" in reason else reason

    monkeypatch.setattr(peer, "why_not", why_not)
    monkeypatch.setattr(ops, "_load", lambda module: importlib.import_module(module))
    monkeypatch.setenv(ops.ENVIRONMENT, "mamba_ssm")
    torch.testing.assert_close(model(tokens), expected)
    _, state = model(tokens, return_state=True)
    if family == "mamba":
        with pytest.raises(RuntimeError, match="'mamba_ssm', but h0"):
            model(tokens, initial_state=state)
    else:
        again = model(tokens, initial_state=state)
        monkeypatch.delenv(ops.ENVIRONMENT)
        torch.testing.assert_close(again, model(tokens, initial_state=state))


def test_is_never_chosen_unasked(monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    for op in ("selective_scan", "ssd"):
        assert list(ops.BACKENDS[op]).index("mamba_ssm") > list(ops.BACKENDS[op]).index("torch")
        assert "mamba_ssm" not in ops.choose(op, torch.zeros(1)).__name__
