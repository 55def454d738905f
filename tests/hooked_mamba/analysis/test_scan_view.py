"""The hidden attention is the scan, whatever rows one asks for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.hooked_mamba.analysis.models import every_family, run
from tests.hooked_mamba.tiny import relative


def dense(cache, layer):
    """alpha b H l l by its definition: one loop over targets, one over sources, products in numpy."""
    view = cache.scan_view(layer)
    dt, A, D = (v.numpy() for v in (view.dt, view.A, view.D))
    b, l, H = dt.shape
    B, C = (v.repeat_interleave(H // v.shape[2], 2).numpy() for v in (view.B, view.C))
    alpha = np.zeros((b, H, l, l))
    for t in range(l):
        for s in range(t + 1):
            decay = np.ones((b, H, B.shape[-1]))
            for j in range(s + 1, t + 1):
                decay = decay * np.exp(dt[:, j, :, None] * A)
            alpha[:, :, t, s] = (C[:, t] * decay * dt[:, s, :, None] * B[:, s]).sum(-1)
        alpha[:, :, t, t] += D
    return alpha


@every_family
def test_rows_are_the_dense_matrix_and_give_y(family):
    _model, _, _, cache = run(family, padded=True)
    for layer in range(2):
        alpha = cache.hidden_attention(layer)
        assert relative(alpha, dense(cache, layer)) < 1e-12
        view = cache.scan_view(layer)
        y = torch.einsum("bhts,bshp->bthp", alpha, view.u)
        assert relative(y.reshape(cache["y", layer].shape), cache["y", layer]) < 1e-12
        assert relative(view.out().y, y) < 1e-12
        assert relative(cache.hidden_attention(layer, average=True), alpha.mean(1)) < 1e-12
        some = [5, 0, 5, 2]
        assert relative(cache.hidden_attention(layer, [3, 1], some), alpha[:, [3, 1]][:, :, some]) < 1e-12
        assert (
            relative(cache.hidden_attention(layer, [3, 1], some, average=True), alpha[:, [3, 1]].mean(1)[:, some])
            < 1e-12
        )
        assert relative(cache.hidden_attention(layer, 2, 6), alpha[:, 2, 6]) < 1e-12


@every_family
def test_effective_attention_as_transformerlens_defines_it(family):
    _model, _, _, cache = run(family)
    M = cache.compute_ssm_effective_attention(1, include_dt_scaling=True)
    view = cache.scan_view(1)
    y_scan = torch.einsum("bhts,bshp->bthp", M, view.u).reshape(cache["y_scan", 1].shape)
    assert relative(y_scan, cache["y_scan", 1]) < 1e-12
    bare = cache.compute_ssm_effective_attention(1)
    assert relative(bare * view.dt.transpose(1, 2).unsqueeze(2), M) < 1e-12
    assert cache.compute_ssm_effective_attention().shape == (2, *bare.shape)
    if family in ("mamba", "falcon"):
        states = cache.compute_ssm_effective_attention(1, True, per_state_coord=True)
        assert relative(states.sum(2), M) < 1e-12


@every_family
def test_states(family):
    model, tokens, _, cache = run(family)
    _, real = model.run_with_cache(tokens, names_filter="blocks.*.mixer.hook_h")
    assert relative(cache.compute_ssm_state(1), real["h", 1]) < 1e-12
    assert relative(cache.compute_ssm_state(1, 4), real["h", 1][:, 4]) < 1e-12
    assert relative(cache.compute_ssm_state(1, [-1, 0]), real["h", 1][:, [-1, 0]]) < 1e-12
    assert relative(cache.compute_ssm_state(), torch.stack([real["h", i] for i in range(2)])) < 1e-12


@every_family
def test_gradients_are_finite_and_right(family):
    model, _, _, cache = run(family)
    A_log = model.blocks[1].mixer.A_log.requires_grad_()

    def total(fn):
        value = fn()
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
        return (value * weights).sum()

    for fn in (
        lambda: cache.compute_ssm_effective_attention(1, True),
        lambda: cache.compute_ssm_state(1),
    ):
        (grad,) = torch.autograd.grad(total(fn), A_log)
        assert torch.isfinite(grad).all()
        eps = 1e-6
        index = (1,) * A_log.ndim
        with torch.no_grad():
            A_log[index] += eps
            up = total(fn)
            A_log[index] -= 2 * eps
            down = total(fn)
            A_log[index] += eps
        assert grad[index].item() == pytest.approx(((up - down) / (2 * eps)).item(), rel=1e-6, abs=1e-9)


def test_large_steps_neither_overflow_nor_lose_the_diagonal():
    _, _, _, cache = run("mamba", torch.float32)
    view = cache.scan_view(0)
    huge = type(view)(view.u, view.dt * 1e4, view.A, view.B, view.C, view.D)
    for alpha in (huge.rows(), huge.mean_rows().unsqueeze(1)):
        assert torch.isfinite(alpha).all()
