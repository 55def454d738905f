"""erasure() against switching each write, removal and decay off, one by one, in a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mamba.analysis import erasure
from hooked_mamba.frozen.run import Run
from tests.hooked_mamba.recurrent.models import KINDS, MAMBA3, bare, equations, tokens_for
from tests.hooked_mamba.tiny import build, relative
from tests.hooked_mamba.tiny import tokens_for as mamba_tokens

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-10
LENGTH = 6


def read_outs(kind: str, sites: dict, S: np.ndarray, heads: int, off: tuple[str, int] | None) -> np.ndarray:
    """y of layer 1, b l H V, from the equations' own values, with one thing at one position switched off."""
    at = "blocks.1.mixer.hook_"
    get = {name.removeprefix(at): value for name, value in sites.items() if name.startswith(at)}
    ys, S = [], S.copy()
    for t in range(LENGTH):
        does = {what: off != (what, t) for what in ("write", "removal", "decay")}
        v = get["v"][:, t] * does["write"]
        if kind == "rwkv7":
            k, kappa, a, r = (get[name][:, t] for name in ("k", "kappa", "a", "r"))
            w = get["w"][:, t] if does["decay"] else np.ones_like(k)
            removed = np.einsum("bhvk,bhk->bhv", S, kappa) * does["removal"]
            S = S * w[:, :, None] - removed[..., None] * (a * kappa)[:, :, None] + v[..., None] * k[:, :, None]
        else:
            r, k = (np.repeat(get[name][:, t], heads // get[name].shape[2], 1) for name in ("q", "k"))
            alpha = get["A_bar"][:, t, :, None] if does["decay"] else np.ones((1, 1, 1))
            beta = get["beta"][:, t, :, None]
            S = alpha[..., None] * S
            removed = np.einsum("bhvk,bhk->bhv", S, k) * does["removal"]
            S = S + (beta * (v - removed))[..., None] * k[:, :, None]
        ys.append(np.einsum("bhvk,bhk->bhv", S, r))
    return np.stack(ys, 1)


def added(model, kind: str, sites: dict, y: np.ndarray) -> np.ndarray:
    """What the mixer of layer 1 adds by way of y, with the norm's divisor and the gate as they were."""
    p = {n.removeprefix("blocks.1.mixer."): w.numpy() for n, w in model.state_dict().items()}
    scale, gate = sites["blocks.1.mixer.norm.hook_scale"], sites.get("blocks.1.mixer.hook_gate", np.ones(1))
    if kind == "rwkv7":
        y = (y - y.mean(-1, keepdims=True)) / scale * p["norm.weight"].reshape(y.shape[2:])
        return (y.reshape(*y.shape[:2], -1) * gate) @ p["output.weight"].T
    return (y / scale * p["norm.weight"] * gate).reshape(*y.shape[:2], -1) @ p["out_proj.weight"].T


@pytest.mark.parametrize("from_state", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_what_doing_it_gives(kind, from_state):
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    state, memory = None, None
    if from_state:
        earlier = tokens_for(length=3, seed=9)
        state, memory = model(earlier, return_state=True)[1], equations(model, earlier).memory
    sites = equations(model, tokens, memory=memory).sites
    heads = sites["blocks.1.mixer.hook_y_scan"].shape[2]
    last = sites["blocks.1.mixer.hook_h"][:, 0]
    S = np.zeros_like(last) if memory is None else memory[1]["S"]
    run = Run(model, tokens, initial_state=state)
    V = torch.randn(2, LENGTH, model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    usual = read_outs(kind, sites, S, heads, None)
    assert relative(usual, sites["blocks.1.mixer.hook_y_scan"]) < EXACT
    for head in range(heads):
        found = erasure(run, 1, head, V)
        for what in ("write", "removal", "decay"):
            for s in range(LENGTH):
                y = usual.copy()
                y[:, :, head] = read_outs(kind, sites, S, heads, (what, s))[:, :, head]
                change = added(model, kind, sites, y) - added(model, kind, sites, usual)
                expected = (V.numpy() * change).sum((1, 2))
                got = getattr(found, what)[:, s].numpy()
                assert np.abs(got - expected).max() < EXACT, (what, s)
        if from_state:
            assert float(found.decay[:, 0].abs().max()) > 0
        for what in ("write", "removal", "decay"):
            assert float(getattr(found, what).abs().max()) > 1e-6


def mamba3_added(model, sites: dict, memory: dict, head: int, off: tuple[str, int] | None) -> np.ndarray:
    """What the mixer of layer 1 adds by way of one head's state, rank by rank."""
    at, mix = "blocks.1.mixer.hook_", model.cfg.branches["mixer"]
    p = {n.removeprefix("blocks.1.mixer."): w.numpy() for n, w in model.state_dict().items()}
    get = {name.removeprefix(at): value for name, value in sites.items() if name.startswith(at)}
    ranks, P = getattr(mix, "mimo_rank", 1), mix.head_dim
    B, C, gate = (get[name].reshape(2, LENGTH, ranks, -1) for name in ("B", "C", "gate"))
    B, C = (v.reshape(2, LENGTH, ranks, mix.H, -1)[:, :, :, head] for v in (B, C))
    up, down = (p[name][head] if ranks > 1 else np.ones((1, P)) for name in ("mimo_x", "mimo_o"))
    gain = gate[..., head * P : (head + 1) * P] * down
    if mix.norm_of_heads:
        scale = sites["blocks.1.mixer.norm.hook_scale"].reshape(2, LENGTH, ranks, mix.H, 1)[:, :, :, head]
        gain = gain / scale * p["norm.weight"][head * P : (head + 1) * P]
    h = memory["ssm"][:, head] if memory else np.zeros((2, P, mix.d_state))
    past = np.zeros_like(h)
    if memory:
        B_last = memory["B"].reshape(2, ranks, mix.H, -1)[:, :, head]
        past = np.einsum("brp,brn->bpn", memory["x"][:, head, None] * up, B_last)
    out = np.zeros((2, LENGTH, P))
    for t in range(LENGTH):
        written = np.einsum("brp,brn->bpn", get["x"][:, t, head, None] * up, B[:, t]) * (off != ("write", t))
        alpha, beta, gamma = (get[name][:, t, head, None, None] for name in ("A_bar", "beta", "gamma"))
        h = (1 if off == ("decay", t) else alpha) * h + beta * past + gamma * written
        past = written
        out[:, t] = (np.einsum("bpn,brn->brp", h, C[:, t]) * gain[:, t]).sum(1)
    return out @ p["out_proj.weight"][:, head * P : (head + 1) * P].T


@pytest.mark.parametrize("from_state", [False, True])
@pytest.mark.parametrize("kind", MAMBA3)
def test_mamba3s_writes_and_decays(kind, from_state):
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    state, memory = None, None
    if from_state:
        earlier = tokens_for(length=3, seed=9)
        state, memory = model(earlier, return_state=True)[1], equations(model, earlier).memory
    sites = equations(model, tokens, memory=memory).sites
    run = Run(model, tokens, initial_state=state)
    V = torch.randn(2, LENGTH, model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for head in range(model.cfg.branches["mixer"].H):
        found = erasure(run, 1, head, V)
        usual = mamba3_added(model, sites, memory[1] if memory else {}, head, None)
        for what in ("write", "decay"):
            for s in range(LENGTH):
                other = mamba3_added(model, sites, memory[1] if memory else {}, head, (what, s))
                expected = (V.numpy() * (other - usual)).sum((1, 2))
                assert np.abs(getattr(found, what)[:, s].numpy() - expected).max() < EXACT, (what, s)
            assert float(getattr(found, what).abs().max()) > 1e-6
        assert not found.removal.any()


@pytest.mark.parametrize("kind", ["rwkv7", "deltanet"])
def test_targets(kind):
    """A token is its direction behind the final norm at the last position; d numbers stand for the last position."""
    model, tokens = bare(kind), tokens_for(length=LENGTH)
    run = Run(model, tokens)
    by_token = erasure(run, -1, 0, 3)
    V = torch.zeros_like(run.resid(2))
    x = run.resid(2)[:, -1].requires_grad_()
    scale = run.cache["ln_final.hook_scale"][:, -1]
    centre = x.mean(-1, keepdim=True) if kind == "rwkv7" else 0
    logit = ((x - centre) / scale * model.ln_final.weight) @ model.unembed.weight[3]
    V[:, -1] = torch.autograd.grad(logit.sum(), x)[0]
    assert relative(by_token.removal, erasure(run, 1, 0, V).removal) < EXACT
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64)
    V = torch.zeros_like(V)
    V[:, -1] = direction
    assert relative(erasure(run, 1, 1, direction).write, erasure(run, 1, 1, V).write) < EXACT


def test_errors():
    run = Run(bare("rwkv7"), tokens_for(length=LENGTH))
    with pytest.raises(ValueError, match="target must be a token"):
        erasure(run, 0, 0, torch.zeros(3))
    with pytest.raises(IndexError, match="layer 7"):
        erasure(run, 7, 0, 1)
    with pytest.raises(IndexError, match="lane 9"):
        erasure(run, 0, 9, 1)
    mamba = build("mamba2")
    with pytest.raises(ValueError, match=r"delta rules.*layer 0 is Mamba-2"):
        erasure(Run(mamba, mamba_tokens(mamba)), 0, 0, 1)
