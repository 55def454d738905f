"""The peer backend over mamba_ssm: layouts and refusals, with a stand-in for the package, which needs a GPU."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from hooked_mamba import ops
from hooked_mamba.ops.selective_scan import naive
from hooked_mamba.ops.ssd import naive as naive_ssd
from tests.hooked_mamba.ops.cases import selective_inputs, ssd_inputs
from tests.hooked_mamba.tiny import build
from tests.kinds import MAMBA


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
    out = naive_ssd.ssd(x, dt, A, B, C, D, h0=initial_states, positions=None)
    return out.y, out.h_last


@pytest.fixture
def choosing(monkeypatch):
    """The module that chooses backends, with the stand-in installed."""
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
    choosing = importlib.import_module("hooked_mamba.ops.choose")
    choosing._import.cache_clear()
    for op in ("selective_scan", "ssd"):
        monkeypatch.delitem(sys.modules, f"hooked_mamba.ops.{op}.mamba_ssm", raising=False)
    yield choosing
    for op in ("selective_scan", "ssd"):
        sys.modules.pop(f"hooked_mamba.ops.{op}.mamba_ssm", None)
        choosing._REGISTERED.pop((op, "mamba_ssm"), None)
    choosing._import.cache_clear()


def test_selective_scan_turns_the_layout(choosing):
    peer = choosing._load("selective_scan", "mamba_ssm")
    inputs = {k: v.float() for k, v in selective_inputs(2, 7, 5, 4).items() if k != "h0"}
    inputs["x"].requires_grad_()
    found = peer.run(**inputs, h0=None, positions=None)
    expected = ops.selective_scan(**inputs, backend="naive")
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.h_last, expected.h_last)
    found.y.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient of the last state"):
        peer.run(**inputs, h0=None, positions=None).h_last.sum().backward()


def test_ssd(choosing):
    peer = choosing._load("ssd", "mamba_ssm")
    inputs = {k: v.float() for k, v in ssd_inputs(2, 7, 4, 3, 2, 5).items()}
    found = peer.run(**inputs, positions=None, chunk=40)
    expected = ops.ssd(**inputs, backend="naive")
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.h_last, expected.h_last)


def test_refuses_what_its_kernels_cannot_do(choosing):
    peer = choosing._load("selective_scan", "mamba_ssm")
    assert "needs a GPU" in peer.refusal(torch.zeros(1, 2, 3), 16, frozenset())
    inputs = {k: v.float() for k, v in selective_inputs(1, 3, 2, 2).items()}
    with pytest.raises(ValueError, match="no initial state"):
        peer.run(**inputs, positions=None)


@pytest.mark.parametrize("family", MAMBA)
@torch.no_grad()
def test_whole_models_run_on_it(choosing, monkeypatch, family):
    """A model that starts from nothing must not pass a state of zeros: Mamba-1's kernel takes none."""
    model, tokens = build(family), torch.arange(14).reshape(2, 7)
    expected = model(tokens)
    for op in ("selective_scan", "ssd"):
        anywhere = replace(choosing._load(op, "mamba_ssm"), refuses=lambda x, N: None)
        monkeypatch.setitem(choosing._REGISTERED, (op, "mamba_ssm"), anywhere)
    monkeypatch.setenv(ops.ENVIRONMENT, "mamba_ssm")
    torch.testing.assert_close(model(tokens), expected)
    _, state = model(tokens, return_state=True)
    if family == "mamba":
        with pytest.raises(RuntimeError, match="'mamba_ssm', but it starts from a state of zero"):
            model(tokens, initial_state=state)
    else:
        again = model(tokens, initial_state=state)
        monkeypatch.delenv(ops.ENVIRONMENT)
        torch.testing.assert_close(again, model(tokens, initial_state=state))


def test_is_never_chosen_unasked(monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    for op in ("selective_scan", "ssd"):
        assert list(ops.BACKENDS[op]).index("mamba_ssm") > list(ops.BACKENDS[op]).index("torch")
        assert ops.choose(op, torch.zeros(1)).name != "mamba_ssm"
