"""The weights under the names of the field: by hand, they make the forward pass."""

from __future__ import annotations

import pytest
import torch

from tests.hooked_mamba.tiny import build, relative, tokens_for
from tests.kinds import MAMBA


@pytest.mark.parametrize("family", ["mamba", "falcon"])
def test_weight_views_of_mamba_reproduce_its_forward(family):
    model = build(family, use_bias=True).double()
    cfg = model.cfg
    tokens = tokens_for(model)
    logits, c = model.run_with_cache(tokens, names_filter=lambda name: True)
    with torch.no_grad():
        assert torch.equal(c["embed"], model.W_E[tokens])
        for i in range(cfg.n_layers):
            out = c["normalized", i] * model.w_norm[i]
            assert relative(c["x_pre", i], out @ model.W_in_x[i] + model.b_in[i, : cfg.E]) < 1e-12
            assert relative(c["mixer.z", i], out @ model.W_in_z[i] + model.b_in[i, cfg.E :]) < 1e-12
            assert relative(c["in_proj", i], out @ model.W_in[i] + model.b_in[i]) < 1e-12
            conv = model.b_conv[i] + c["x_pre", i] * model.W_conv[i, :, -1]
            for k in range(1, cfg.d_conv):
                conv[:, k:] += c["x_pre", i][:, :-k] * model.W_conv[i, :, -1 - k]
            assert relative(c["conv", i], conv) < 1e-12
            x = c["x", i]
            low, B, C = x @ model.W_dt_low[i], x @ model.W_B[i], x @ model.W_C[i]
            assert relative(c["x_proj", i], torch.cat([low, B, C], -1)) < 1e-12
            assert relative(c["dt_pre", i], c["dt_low", i] @ model.W_dt_proj[i] + model.b_dt[i]) < 1e-12
            if family == "mamba":
                assert relative(c["dt_pre", i], x @ model.W_dt[i] + model.b_dt[i]) < 1e-12
                assert relative(c["B", i], B) < 1e-12
                assert relative(c["C", i], C) < 1e-12
            assert relative(c["A_bar", i], (c["dt", i][..., None] * model.A[i]).exp()) < 1e-12
            assert relative(model.A[i], -model.A_log[i].exp()) < 1e-12
            assert relative(c["skip", i], x * model.D[i]) < 1e-12
            assert relative(c["out_proj", i], c["y_gated", i] @ model.W_out[i] + model.b_out[i]) < 1e-12
        assert relative(logits, c["ln_final.hook_out"] @ model.W_U + model.b_U) < 1e-12


@pytest.mark.parametrize("family", ["mamba2", "mamba2-groups"])
def test_weight_views_of_mamba2_reproduce_its_forward(family):
    model = build(family).double()
    cfg = model.cfg
    tokens = tokens_for(model)
    logits, c = model.run_with_cache(tokens, names_filter=lambda name: True)
    GN = cfg.G * cfg.d_state
    with torch.no_grad():
        for i in range(cfg.n_layers):
            out, b = c["out", i], model.b_in[i]
            assert relative(c["mixer.z", i], out @ model.W_in_z[i] + b[: cfg.E]) < 1e-12
            W = torch.cat([model.W_in_x[i], model.W_B[i].flatten(1), model.W_C[i].flatten(1)], 1)
            assert relative(c["x_pre", i], out @ W + b[cfg.E : 2 * cfg.E + 2 * GN]) < 1e-12
            assert model.W_B.shape == model.W_C.shape == (cfg.n_layers, cfg.d_model, cfg.G, cfg.d_state)
            dt_pre = out @ model.W_dt[i] + b[2 * cfg.E + 2 * GN :] + model.b_dt[i]
            assert relative(c["dt_pre", i], dt_pre) < 1e-12
            assert relative(c["A_bar", i], (c["dt", i] * model.A[i]).exp()) < 1e-12
            assert relative(c["skip", i], c["x", i] * model.D[i][:, None]) < 1e-12
            gated = c["normalized", i, "mixer.norm"] * model.w_gated_norm[i]
            assert relative(c["out_proj", i], gated @ model.W_out[i] + model.b_out[i]) < 1e-12
        assert relative(logits, c["ln_final.hook_out"] @ model.W_U + model.b_U) < 1e-12


def test_views_carry_gradients():
    for family in MAMBA:
        model = build(family)
        (model.W_in_x.square().sum() + model.W_out.sum()).backward()
        assert all(block.mixer.in_proj.weight.grad is not None for block in model.blocks)
