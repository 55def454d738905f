"""Where rules that share products out put their numbers: against a replay, in numpy and loops, of what they hold.

With sigma, dt and norms held, and of each product one factor at a time free, a block is affine. So what an embedding or
the memory adds is what is missing when it is replaced by zero. Nothing of `circuits` is used for the replay.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import FrozenModel, Logit, attribute
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import array, sigmoid
from tests.kinds import MAMBA

SHARES = {"half": (0.0, 0.0, 1.0), "uneven": (0.5, 0.2, 0.3), "B alone": (0.0, 1.0, 0.0), "C alone": (1.0, 0.0, 0.0)}


class Block:
    """One block of one prompt, and the constants of its run."""

    def __init__(self, model, cache, i, row, mask, before):
        cfg, mixer = model.cfg, model.blocks[i].mixer
        self.cfg, self.mask, self.mamba2 = cfg, mask[:, None], hasattr(cfg, "head_dim")
        at = {
            name: array(cache[f"blocks.{i}.mixer.hook_{name}"][row])
            for name in ("in_proj", "x", "dt", "B", "C", "gate", "y", "z")
        }
        self.at, self.l = at, len(mask)
        self.norm = array(model.blocks[i].norm.weight) / array(cache[f"blocks.{i}.norm.hook_scale"][row])
        self.W_in, self.W_o = array(mixer.in_proj.weight), array(mixer.out_proj.weight)
        self.b_in = 0.0 if mixer.in_proj.bias is None else array(mixer.in_proj.bias)
        self.b_o = 0.0 if mixer.out_proj.bias is None else array(mixer.out_proj.bias)
        self.kappa = array(mixer.conv1d.weight)[:, 0]
        self.b_c = 0.0 if mixer.conv1d.bias is None else array(mixer.conv1d.bias)
        self.A, self.D = -np.exp(array(mixer.A_log)), array(mixer.D)
        self.history, self.h0 = array(before.conv[row]), array(before.ssm[row]).reshape(cfg.E, -1)
        self.x_proj = None if self.mamba2 else array(mixer.x_proj.weight)
        self.behind = 1.0
        if self.mamba2:
            scale = array(cache[f"blocks.{i}.mixer.norm.hook_scale"][row])[..., 0]
            self.behind = array(mixer.norm.weight) / np.repeat(scale, cfg.E // scale.shape[1], axis=1)
            self.A, self.D = np.repeat(self.A, cfg.head_dim)[:, None], np.repeat(self.D, cfg.head_dim)
            at["dt"] = np.repeat(at["dt"], cfg.head_dim, axis=1)
        self.u, self.y = at["x"].reshape(self.l, -1), at["y"].reshape(self.l, -1)
        p = self.conv_input(at["in_proj"])
        self.sigma = sigmoid(self.conv(p, self.history))

    def conv_input(self, z_and_x):
        E = self.cfg.E
        widths = slice(E, E + len(self.kappa)) if self.mamba2 else slice(0, E)
        return z_and_x[:, widths] * self.mask

    def conv(self, p, history):
        K = self.kappa.shape[1]
        padded = np.concatenate([history, p])
        return self.b_c + sum(self.kappa[:, j] * padded[j : j + self.l] for j in range(K))

    def channels(self, v):
        """B or C for each channel, l E N."""
        if not self.mamba2:
            return np.repeat(v[:, None], self.cfg.E, axis=1)
        v = v.reshape(self.l, self.cfg.G, -1)
        return np.repeat(v, self.cfg.E // self.cfg.G, axis=1)

    def scan(self, u, B, C, h0):
        h, y = h0.copy(), np.zeros_like(u)
        for t in range(self.l):
            dt = self.at["dt"][t][:, None]
            h = np.exp(dt * self.A) * h + dt * self.channels(B)[t] * u[t][:, None]
            y[t] = (self.channels(C)[t] * h).sum(-1)
        return y

    def out(self, x, shares, half, memory):
        """The held block's output; `memory` scales what was before the first position."""
        E, N, (c, b, v) = self.cfg.E, self.cfg.d_state, shares
        z_and_x = (x * self.norm) @ self.W_in.T + self.b_in
        free = self.conv(self.conv_input(z_and_x), self.history * memory) * self.sigma * self.mask
        u, z = free[:, :E], z_and_x[:, :E] if self.mamba2 else z_and_x[:, E : 2 * E]
        width = N * (self.cfg.G if self.mamba2 else 1)
        selected = free[:, E:] if self.mamba2 else (u @ self.x_proj.T)[:, self.cfg.R :]
        B, C = selected[:, :width], selected[:, width:]
        u0, B0, C0, none = self.u, self.at["B"], self.at["C"], np.zeros_like(self.h0)
        y = self.D * u + v * self.scan(u, B0, C0, none) + (1 - c) * self.scan(0 * u, B0, C0, self.h0 * memory)
        y += b * self.scan(u0, B, C0, none) + c * self.scan(u0, B0, C, self.h0)
        gate = self.at["gate"].reshape(self.l, -1)
        gated = y * gate
        if half:
            gated = (gated + self.y * z * sigmoid(self.at["z"].reshape(self.l, -1))) / 2
        return (gated * self.behind) @ self.W_o.T + self.b_o


@pytest.mark.parametrize("rule", SHARES)
@pytest.mark.parametrize("start", ["padded", "with a past"])
@pytest.mark.parametrize("family", MAMBA)
def test_embeddings_and_memory_add_what_is_missing_without_them(family, start, rule):
    model, tokens, row = random_model(13, family, n_layers=2), random_tokens(13, batch=2, length=5), 1
    if family == "mamba":
        assert not model.cfg.mixer_norms  # the replay has none
    mask, run, before = np.ones(5), {}, model.initial_state(2)
    if start == "padded":
        mask[:2] = 0
        run = {"attention_mask": torch.tensor([[1] * 5, mask.astype(int).tolist()])}
    else:
        with torch.no_grad():
            before = model(random_tokens(14, batch=2), return_state=True)[1].detach()
        run = {"initial_state": before}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, **run)
    blocks = [Block(model, cache, i, row, mask, before[i]) for i in range(2)]
    final = array(model.ln_final.weight) / array(cache["ln_final.hook_scale"][row])
    direction, shares, half = final[-1] * array(model.unembed.weight)[3], SHARES[rule], rule == "half"

    def logit(without=None, forgetful=None):
        x = array(cache["hook_embed"][row]).copy()
        if without is not None:
            x[without] = 0
        for i, block in enumerate(blocks):
            x = x + block.out(x, shares, half, memory=float(forgetful != i))
        return float(x[-1] @ direction)

    frozen = FrozenModel(model, tokens, selection="half" if half else shares, **run)
    found = attribute(frozen, targets=Logit(3))
    assert abs(logit() - float(found.target[row])) < 1e-9
    for t in range(5):
        assert abs(logit() - logit(without=t) - float(found.embeddings[row, t])) < 1e-9
    for i in range(2):
        assert abs(logit() - logit(forgetful=i) - float(found.initial[i][row])) < 1e-9
    assert (float(found.initial[0][row].abs()) > 0) == (start == "with a past")
