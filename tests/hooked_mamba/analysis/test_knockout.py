"""Knockout against a dense recomputation in numpy; ablation against hooks."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from hooked_mamba.analysis.ablation import ablate
from hooked_mamba.analysis.knockout import knockout, knockout_sweep
from tests.hooked_mamba.analysis.models import every_family, model_for, run, two_families
from tests.hooked_mamba.reference import forward
from tests.hooked_mamba.tiny import arrays, relative, tokens_for


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class DenseCut:
    """Edits of the reference pass that subtract chosen terms, pair by pair, from dense matrices."""

    def __init__(self, model, layer, sources, targets, source):
        self.model, self.layer = model, layer
        self.sources, self.targets, self.source = sources, targets, source
        self.seen = {}

    def edits(self):
        at = f"blocks.{self.layer}.mixer.hook_"
        watched = ("x_pre", "conv", "x", "C", "A_bar", "B_bar")
        return {at + name: self.keep(name) for name in watched} | {at + "y": self.cut}

    def keep(self, name):
        def edit(value):
            self.seen[name] = value
            return value

        return edit

    def alpha(self, b, t, s, e):
        """One entry, by its definition."""
        cfg = self.model.cfg
        A_bar, B_bar, C = (self.seen[name] for name in ("A_bar", "B_bar", "C"))
        if C.ndim == 3:
            product = np.prod(A_bar[b, s + 1 : t + 1, e], axis=0)
            value = (C[b, t] * product * B_bar[b, s, e]).sum()
            return value + (self.model.blocks[self.layer].mixer.D[e].item() if t == s else 0)
        h = e // cfg.P
        product = np.prod(A_bar[b, s + 1 : t + 1, h])
        value = (C[b, t, h // (cfg.H // cfg.G)] * product * B_bar[b, s, h]).sum()
        return value + (self.model.blocks[self.layer].mixer.D[h].item() if t == s else 0)

    def term(self, b, t, s, e):
        """What target t gets from source s."""
        if self.source == "scan":
            x = self.seen["x"]
            return self.alpha(b, t, s, e) * x.reshape(*x.shape[:2], -1)[b, s, e]
        taps = self.model.blocks[self.layer].mixer.conv1d.weight[:, 0].numpy()
        K, total = taps.shape[1], 0.0
        for k in range(K):
            if s + k <= t:
                factor = sigmoid(self.seen["conv"][b, s + k, e]) * taps[e, K - 1 - k]
                total += self.alpha(b, t, s + k, e) * factor * self.seen["x_pre"][b, s, e]
        return total

    def cut(self, y):
        flat = y.reshape(*y.shape[:2], -1)
        for b in range(flat.shape[0]):
            for t in self.targets:
                for s in self.sources:
                    if s <= t:
                        for e in range(flat.shape[2]):
                            flat[b, t, e] -= self.term(b, t, s, e)
        return flat.reshape(y.shape)


@every_family
@pytest.mark.parametrize("source", ["token", "scan"])
def test_knockout_equals_the_dense_recomputation(family, source):
    model = model_for(family)
    tokens = tokens_for(model, rows=2)
    sources, targets = [1, 3], [3, 4, 6]
    edits = {}
    for layer in range(2):
        edits |= DenseCut(model, layer, sources, targets, source).edits()
    weights = arrays(model.state_dict())
    expected = forward(model.cfg, weights, tokens.numpy(), edits).logits
    with knockout(model, sources, targets, source=source):
        got = model(tokens)
    assert relative(got, expected) < 1e-12
    plain = model(tokens)
    assert relative(plain, forward(model.cfg, weights, tokens.numpy()).logits) < 1e-12
    assert relative(got, plain.numpy()) > 1e-3  # it does something
    assert relative(got[:, :3], plain[:, :3]) < 1e-13  # and nothing before its first target


@every_family
@pytest.mark.parametrize("source", ["token", "scan"])
def test_a_write_that_never_happens_is_read_by_nobody(family, source):
    """With the skip put back, cut='write' is cut='read' for all targets in a one-layer model."""
    model = model_for(family, n_layers=1)
    tokens = tokens_for(model, rows=2)
    with knockout(model, 2, source=source):
        _, read = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_y")
    with knockout(model, 2, source=source, cut="write"):
        _, write = model.run_with_cache(
            tokens, names_filter=["blocks.0.mixer.hook_y_scan", "blocks.0.mixer.hook_Bx", "blocks.0.mixer.hook_skip"]
        )
        _, state = model(tokens, return_state=True)
    _, whole = model.run_with_cache(tokens)
    mixer = model.blocks[0].mixer
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 2] = True
    view = whole.scan_view(0)
    cut = view.u * mask[..., None, None] if source == "scan" else whole.token_path(0).input_of(mask)
    skip = (mixer.D[:, None] * cut.reshape(view.u.shape)).reshape(read["y", 0].shape)
    assert relative(write["y_scan", 0] + write["skip", 0] - skip, read["y", 0]) < 1e-12
    if source == "scan":
        assert not write["Bx", 0][:, 2].any()
    _, plain = model(tokens, return_state=True)
    assert relative(state[0].ssm, plain[0].ssm) > 1e-3


class DenseCuts(DenseCut):
    """Several cuts (sources, targets, source, cut, channels) at once: every term goes once, whoever cuts it."""

    def __init__(self, model, layer, cuts):
        super().__init__(model, layer, (), (), "token")
        self.cuts = cuts

    def removed(self, b, s, e, cuts):
        """The part of u_s that is gone."""
        x = self.seen["x"]
        cuts = [cut for cut in cuts if len(cut) < 5 or e in cut[4]]
        if any(cut[2] == "scan" and s in cut[0] for cut in cuts):
            return x.reshape(*x.shape[:2], -1)[b, s, e]
        gone = {token for cut in cuts if cut[2] == "token" for token in cut[0]}
        taps = self.model.blocks[self.layer].mixer.conv1d.weight[:, 0].numpy()
        K = taps.shape[1]
        through = sum(
            taps[e, K - 1 - s + token] * self.seen["x_pre"][b, token, e] for token in gone if s - K < token <= s
        )
        return sigmoid(self.seen["conv"][b, s, e]) * through

    def cut(self, y):
        flat = y.reshape(*y.shape[:2], -1)
        D = (
            self.model.blocks[self.layer]
            .mixer.D.numpy()
            .repeat(flat.shape[2] // self.model.blocks[self.layer].mixer.D.numel())
        )
        writes = [cut for cut in self.cuts if cut[3] == "write"]
        for b, t, e in np.ndindex(flat.shape):
            reads = [cut for cut in self.cuts if cut[3] == "read" and t in cut[1]]
            for s in range(t + 1):
                weight = self.alpha(b, t, s, e) - (D[e] if s == t else 0)
                flat[b, t, e] -= weight * self.removed(b, s, e, reads + writes)
            flat[b, t, e] -= D[e] * self.removed(b, t, e, reads)
        return flat.reshape(y.shape)


NESTED = {
    "the same twice": [([1, 3], [4, 6], "token", "read")] * 2,
    "overlapping": [([1, 3], [3, 4], "token", "read"), ([3, 4], [4, 6], "token", "read")],
    "token, then scan": [([1], [3, 4], "token", "read"), ([2, 3], [4, 5], "scan", "read")],
    "scan, then token": [([2, 3], [4, 5], "scan", "read"), ([1], [3, 4], "token", "read")],
    "three": [([2], [4], "scan", "read"), ([1, 2], [4, 5, 6], "token", "read"), ([0, 2], [5], "scan", "read")],
    "writes": [([1, 2], None, "token", "write"), ([2, 3], None, "scan", "write"), ([1], None, "token", "write")],
    "writes, scan first": [([2, 3], None, "scan", "write"), ([1, 2], None, "token", "write")],
    "write inside read": [([2, 3], [3, 5], "scan", "read"), ([3], None, "scan", "write")],
    "read inside write": [([2], None, "token", "write"), ([2, 3], [2, 3, 5], "token", "read")],
    "channels": [([2], [4, 6], "scan", "read", [1, 3]), ([1], [3, 4], "token", "read", [0, 1])],
    "channels are written": [([2], None, "token", "write", [1, 2]), ([1, 2], [3, 4], "token", "read", [2, 3])],
    "a channel is written": [([2], None, "scan", "write", [3]), ([2], [2, 4], "scan", "read", [2, 3])],
    "all kinds": [([2], [4, 6], "scan", "read"), ([1], None, "token", "write"), ([1, 4], [4, 5], "token", "read")],
}


@every_family
@pytest.mark.parametrize("name", NESTED)
def test_nested_knockouts_cut_every_term_once(family, name):
    model = model_for(family, n_layers=1)
    tokens = tokens_for(model, rows=2)
    edits = DenseCuts(model, 0, NESTED[name]).edits()
    expected = forward(model.cfg, arrays(model.state_dict()), tokens.numpy(), edits).logits
    plain = model(tokens)
    with ExitStack() as stack:
        for sources, targets, source, cut, *channels in NESTED[name]:
            which = {"source": source, "cut": cut, "channels": channels[0] if channels else None}
            stack.enter_context(knockout(model, iter(sources), targets and iter(targets), **which))
        got = model(tokens)
    assert relative(got, expected) < 1e-12
    assert relative(got, plain.numpy()) > 1e-3
    assert torch.equal(model(tokens), plain)


GENERATED = {
    "token": [{"sources": [1, 3], "targets": slice(4, None)}],
    "scan, new sources too": [{"sources": slice(3, 7), "targets": slice(5, None, 2), "source": "scan", "channels": 3}],
    "nested": [
        {"sources": [1, 3, 5], "targets": [5, 6, 7], "layers": 1},
        {"sources": [2, 3], "targets": slice(6, None), "source": "scan"},
        {"sources": [4], "source": "token", "cut": "write", "channels": [0, 2]},
    ],
}


def generated(model, tokens, cuts, mask=None):
    """Tokens, and the logits of every column that generating passed."""
    seen = []
    with ExitStack() as stack:
        for cut in cuts:
            stack.enter_context(knockout(model, **cut))
        stack.enter_context(model.hooks([("hook_logits", lambda x, hook: seen.append(x.clone()))]))
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "attention_mask": mask}
        return model.generate(tokens, 5, **options), torch.cat(seen, 1)


@every_family
@pytest.mark.parametrize("name", GENERATED)
def test_while_generating_everything_that_was_read_stays_cut(family, name):
    model = model_for(family)
    tokens = tokens_for(model, rows=2, length=4)
    made, logits = generated(model, tokens, GENERATED[name])
    with ExitStack() as stack:
        for cut in GENERATED[name]:
            stack.enter_context(knockout(model, **cut))
        whole = model(made[:, :-1])
    assert relative(logits, whole.numpy()) < 1e-12
    assert relative(logits[:, -1], model(made[:, :-1])[:, -1].numpy()) > 1e-4


@two_families
def test_positions_that_are_never_reached_change_nothing(family):
    model = model_for(family)
    tokens = tokens_for(model, rows=2, length=4)
    plain = generated(model, tokens, [])
    for cut in ({"sources": 1, "targets": 99}, {"sources": 99}, {"sources": []}):
        assert torch.equal(generated(model, tokens, [cut])[1], plain[1])


@two_families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("source", ["token", "scan"])
def test_generating_from_padded_prompts(family, side, source):
    model = model_for(family)
    tokens = tokens_for(model, rows=2, length=7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    mask = mask if side == "left" else mask.flip(1)
    sources = torch.zeros(2, 7, dtype=torch.bool)
    sources[0, 6] = sources[1, 3] = True
    cut = {"targets": slice(7, None), "source": source}
    made, logits = generated(model, tokens, [{"sources": sources, **cut}], mask)
    for row in range(2):
        real = mask[row].bool()
        alone = {"sources": sources[row : row + 1, real], **cut, "targets": slice(int(real.sum()), None)}
        made_alone, logits_alone = generated(model, tokens[row : row + 1, real], [alone])
        assert torch.equal(made[row, 7:], made_alone[0, int(real.sum()) :])
        assert relative(logits[row, 7:], logits_alone[0, int(real.sum()) :]) < 1e-12


@two_families
def test_knockouts_of_different_layers_do_not_know_of_each_other(family):
    model = model_for(family)
    tokens = tokens_for(model, rows=2)
    with knockout(model, 2, -1, [0, 1]):
        both = model(tokens)
    with knockout(model, 2, -1, 0), knockout(model, 2, -1, 1):
        assert relative(model(tokens), both) < 1e-13


@two_families
def test_rows_can_have_their_own_sources(family):
    model = model_for(family)
    tokens = tokens_for(model, rows=2)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    with knockout(model, mask, -1, 1):
        together = model(tokens)
    for row, s in ((0, 1), (1, 4)):
        with knockout(model, [s], -1, 1):
            assert relative(together[row : row + 1], model(tokens[row : row + 1])) < 1e-12


@two_families
def test_a_sweep_is_its_single_runs(family):
    model = model_for(family, n_layers=3)
    tokens = tokens_for(model, rows=2)
    sweep = knockout_sweep(
        model, tokens, lambda logits: logits[:, -1, 3].mean(), window=2, batch_size=5, progress=False
    )
    assert sweep.shape == (2, 7)
    for start in range(2):
        for s in (0, 5):
            with knockout(model, s, -1, [start, start + 1]):
                assert sweep[start, s] == pytest.approx(model(tokens)[:, -1, 3].mean().item(), rel=1e-5)
    by_row = knockout_sweep(model, tokens, lambda logits: logits[:, -1, 3], window=2, batch_size=5, progress=False)
    assert by_row.shape == (2, 7, tokens.shape[0])
    torch.testing.assert_close(by_row.mean(-1), sweep)
    with pytest.raises(ValueError, match="no source positions"):
        knockout_sweep(model, tokens, lambda logits: logits.mean(), positions=[], progress=False)
    with pytest.raises(IndexError, match="position 9 is out of range for 7 positions"):
        knockout_sweep(model, tokens, lambda logits: logits.mean(), positions=[0, 9], progress=False)


def test_knockout_leaves_no_hook_and_reports_wrong_arguments():
    model = model_for("mamba")
    tokens = tokens_for(model)
    with pytest.raises(IndexError, match="position 9"), knockout(model, 9):
        model(tokens)
    assert not any(point.wanted for point in model.hook_points())
    with pytest.raises(ValueError, match="leave targets out"), knockout(model, 1, 2, cut="write"):
        pass
    with pytest.raises(IndexError, match="layer 5"), knockout(model, 1, layers=5):
        pass
    with pytest.raises(IndexError, match="channel 99 is out of range"), knockout(model, 1, channels=[0, 99]):
        pass


@two_families
def test_ablations(family):
    model, tokens, plain, cache = run(family)
    name = "blocks.1.mixer.hook_out_proj"
    site = cache[name]
    with ablate(model, name):
        assert relative(model(tokens), model(cache["resid_pre", 1], start_at_layer=2)) < 1e-12
    with ablate(model, name, "mean", cache, positions=[2, -1], units=[0, 3]):
        _, after = model.run_with_cache(tokens, names_filter=name)
    expected = site.clone()
    for t in (2, 6):
        for e in (0, 3):
            expected[:, t, e] = site[..., e].mean()
    assert relative(after[name], expected) < 1e-13
    with ablate(model, "blocks.*.mixer.hook_x", "mean", cache, mean_over="batch"):
        _, after = model.run_with_cache(tokens)
    assert relative(after["x", 1], cache["x", 1].mean(0, keepdim=True).expand_as(cache["x", 1])) < 1e-13
    with ablate(model, ["blocks.0.mixer.hook_x", "blocks.1.mixer.hook_dt"], "resample", cache, seed=1):
        _, after = model.run_with_cache(tokens)
    drawn = [[torch.equal(a, b) for b in cache["x", 0]].index(True) for a in after["x", 0]]
    assert drawn != [0, 1, 2]
    assert torch.equal(after["dt", 1], cache["dt", 1][drawn])
    with ablate(model, "blocks.0.mixer.hook_h.3"):
        _, state = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_h.3")
    assert not state["h.3", 0].any()
    assert torch.equal(model(tokens), plain)


def test_ablation_reports_what_it_needs():
    model = model_for("mamba")
    with pytest.raises(ValueError, match="needs reference"), ablate(model, "hook_embed", "mean"):
        pass
