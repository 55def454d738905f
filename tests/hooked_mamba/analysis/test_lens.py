"""Lenses and direct logit attribution."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hooked_mamba.analysis.direct_logits import direct_logit_attribution, source_logit_attribution
from hooked_mamba.analysis.hidden_attention import attention_map, attention_rollout
from hooked_mamba.analysis.lens import lens_labels, logit_lens, read_lens
from hooked_mamba.analysis.tuned_lens import TunedLens
from tests.hooked_mamba.analysis.models import run, two_families
from tests.hooked_mamba.tiny import relative, tokens_for


@two_families
def test_logit_lens_ends_in_the_models_logits(family):
    model, _, logits, cache = run(family, padded=True)
    for frozen in (False, True):
        lens = logit_lens(cache, frozen_norm=frozen)
        assert lens.shape == (3, *logits.shape)
        assert relative(lens[-1], logits) < 1e-12
    early = model(cache["resid_post", 0], start_at_layer=2)
    assert relative(logit_lens(cache)[1], early) < 1e-12
    scaled = cache["resid_post", 0] / cache["scale"] * model.ln_final.weight @ model.W_U
    assert relative(logit_lens(cache, frozen_norm=True)[1], scaled) < 1e-12
    vocab = torch.tensor([3, 1])
    assert relative(logit_lens(cache, [-1], 6, vocab=vocab)[0], logits[:, 6, vocab]) < 1e-12
    reading = read_lens(logit_lens(cache), 4)
    assert reading.tokens.shape == (3, 3, 7, 4)
    assert reading.kl[-1].abs().max() < 1e-12
    assert (reading.kl[:-1, 0] > 0).all()  # the row without padding
    assert lens_labels(cache) == ["embed", "after 0", "after 1"]


@two_families
def test_direct_attributions_sum_to_logits(family):
    _model, _, logits, cache = run(family)
    rows = torch.arange(3)
    answer, other = torch.tensor([3, 1, 3]), torch.tensor([1, 5, 9])
    kinds = ("layer", "channel", "head") if family.startswith("mamba2") else ("layer", "channel")
    for by in kinds:
        parts = direct_logit_attribution(cache, answer, other, by)
        assert len(parts.labels) == len(parts.values)
        assert relative(parts.values.sum(0), (logits[rows, -1, answer] - logits[rows, -1, other])) < 1e-11
        assert relative(direct_logit_attribution(cache, 4, by=by, pos_slice=None).values.sum(0), logits[..., 4]) < 1e-12
    label, value = parts.top(1)[0]
    assert abs(value) == pytest.approx(float(parts.values.mean(1).abs().max()))
    assert label in parts._repr_html_()


@two_families
@pytest.mark.parametrize("source", ["scan", "token"])
def test_source_attributions_sum_to_the_mixers_parts(family, source):
    _model, _, _, cache = run(family, padded=True)
    answer = torch.tensor([3, 1, 3])
    layers = direct_logit_attribution(cache, answer, pos_slice=5)
    sources = source_logit_attribution(cache, answer, source=source, target=5)
    assert sources.shape == (2, 8, 3)
    assert relative(sources.sum(1), layers.values[1:]) < 1e-11
    one = source_logit_attribution(cache, 3, source=source, target=5)
    assert relative(one[:, :, 0], sources[:, :, 0]) < 1e-12


def test_tuned_lens_learns_and_comes_back_from_its_file(tmp_path):
    model, tokens, logits, _ = run("mamba", torch.float32)
    lens = TunedLens.of(model)
    untrained = lens.read(model, tokens)
    assert relative(untrained[-1], logits) < 1e-5
    history = lens.fit(model, [tokens_for(model, 8, 12, seed) for seed in range(60)], lr=1e-2)
    assert sum(history[-1]) < 0.5 * sum(history[0])
    path = tmp_path / "lens.safetensors"
    lens.save(path)
    again = TunedLens.load(path, model)
    assert torch.equal(again.read(model, tokens), lens.read(model, tokens))
    with pytest.raises(ValueError, match="the model has"):
        TunedLens.load(path, run("mamba", torch.float32, n_layers=1)[0])
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no tuned lens"):
        TunedLens.load(tmp_path / "other.safetensors")


@two_families
def test_maps_and_rollout(family):
    _model, _, _, cache = run(family, padded=True)
    alpha = cache.hidden_attention(1)
    u = cache.scan_view(1).u.abs().mean(-1).transpose(1, 2).unsqueeze(2)
    assert relative(attention_map(cache, 1, "mean"), alpha.mean(1)) < 1e-12
    assert relative(attention_map(cache, 1), alpha.abs().mean(1)) < 1e-12
    assert relative(attention_map(cache, 1, "flow", 4), (alpha.abs() * u).mean(1)[:, 4]) < 1e-12
    rollout = attention_rollout(cache, measure="flow")
    assert relative(rollout.sum(-1), torch.ones(3, 7)) < 1e-12
    assert not rollout.triu(1).any()
    maps = [attention_map(cache, i) for i in range(2)]
    eye = torch.eye(7, dtype=maps[0].dtype)
    mixed = [0.5 * m / m.sum(-1, keepdim=True) + 0.5 * eye for m in maps]
    assert relative(attention_rollout(cache, queries=6), (mixed[1] @ mixed[0])[:, 6]) < 1e-12
    with pytest.raises(ValueError, match="not negative"):
        attention_rollout(cache, measure="mean")
