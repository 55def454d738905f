"""Latents at every token, what they say, and what two dictionaries or models share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mamba import HookedMamba
from saes import SparseCoder, encode_on, feature_logits, nearest_features, sae_config, splice
from saes.diff import compare, compare_dictionaries, compare_models
from saes.features import residual_directions
from saes.splicing import LatentEdit
from tests.hooked_mamba.tiny import tokens_for
from tests.kinds import MIXERS
from tests.saes.models import mambacoder_on, sae_on, tiny

OUT = "blocks.0.mixer.hook_out_proj"


@pytest.fixture(scope="module")
def stories():
    return HookedMamba.from_pretrained("tinystories-4l")


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_latents_are_those_of_the_cached_site(architecture):
    model = tiny()
    coders = {"a": sae_on(model, OUT, architecture=architecture), "b": mambacoder_on(model, 1, reads="resid")}
    tokens = tokens_for(model)
    _, cache = model.run_with_cache(tokens)
    read = encode_on(model, coders, tokens)
    a = coders["a"].encode(cache[OUT]).detach()
    torch.testing.assert_close(read["a"], a)
    torch.testing.assert_close(read["b"], coders["b"].encode(cache["blocks.1.hook_resid_pre"]))
    assert read["a"].shape == (2, 7, 24)
    f = int(a.amax((0, 1)).argmax())
    torch.testing.assert_close(read.feature(f, "a"), a[..., f])
    best = read.top(3, "a")
    assert [s.value for s in best] == pytest.approx(sorted(a.amax((0, 1)).tolist())[:-4:-1])
    assert best[0].feature == f
    assert float(a[best[0].row, best[0].position, f]) == pytest.approx(best[0].value)
    assert best[0].token == int(tokens[best[0].row, best[0].position])
    active = read.active(1, 4, "a")
    assert dict(active) == {i: pytest.approx(float(a[1, 4, i])) for i in a[1, 4].nonzero().flatten().tolist()}
    assert [v for _, v in active] == sorted((v for _, v in active), reverse=True)
    with pytest.raises(KeyError, match="several coders, name one of a, b"):
        read.dense()
    with pytest.raises(IndexError, match="a has 24"):
        read.feature(24, "a")


def test_padding_has_no_latents_and_texts_have_strings(stories):
    sae = SparseCoder(sae_config("blocks.1.mixer.hook_out_proj", 192, 300, k=5), seed=0)
    texts = ["Tom saw a big dog. The dog was very happy, and so was Tom.", "Lily <b>ran</b>."]
    read = encode_on(stories, sae, texts)
    assert not bool(read.real[1].all())
    assert (read.dense()[~read.real] == 0).all()
    alone = encode_on(stories, sae, texts[1])
    torch.testing.assert_close(read.dense()[1][read.real[1]], alone.dense()[0], rtol=1e-4, atol=1e-5)
    assert "".join(alone.strings[0]) == texts[1]
    assert read.token(0, 0) == read.strings[0][0] == "Tom"
    shown = read._repr_html_()
    assert "<b>" not in shown
    assert "&lt;" in shown
    assert "l1-out_proj" in shown


def test_reading_inside_a_splice_sees_the_edit():
    model = tiny()
    first, second, tokens = sae_on(model, OUT), mambacoder_on(model, 1), tokens_for(model)
    clean = encode_on(model, second, tokens).dense()
    with splice(model, first, error=True, features=LatentEdit((3,), lambda z: 0 * z + 9)):
        moved = encode_on(model, second, tokens).dense()
    _, cache = model.run_with_cache(tokens, names_filter=OUT)
    changed = cache[OUT] + 9 * first.W_dec[3]
    hooks = [(OUT, lambda value, hook: changed)]
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.norm.hook_out", fwd_hooks=hooks)
    torch.testing.assert_close(moved, second.encode(cache["blocks.1.norm.hook_out"]))
    assert (moved - clean).abs().max() > 1e-3


@pytest.mark.parametrize("family", MIXERS)
def test_feature_logits_by_hand(family):
    """Decoder row times norm weight times unembedding; for what out_proj reads, through out_proj first."""
    model = tiny(family)
    read = model.mixer(1).vectors_site
    cases = [
        (sae_on(model, "blocks.1.hook_resid_post"), None),
        (sae_on(model, f"blocks.1.mixer.{model.mixer(1).out_site}"), None),
        (mambacoder_on(model, 0), None),
    ]
    cases += [(sae_on(model, f"blocks.1.mixer.{read}"), 1)] if read else []
    for coder, through in cases:
        direction = coder.W_dec[5].detach().numpy()
        if through is not None:
            direction = model.mixer(1).value_output().W.detach().numpy() @ direction
        logits = model.unembed.weight.detach().numpy() @ (model.ln_final.weight.detach().numpy() * direction)
        logits = logits - logits.mean()
        got = feature_logits(model, coder, 5, k=4)
        np.testing.assert_allclose(got.logits[0], logits, rtol=1e-10, atol=1e-12)
        order = np.argsort(-logits)
        assert [token for token, _ in got.promoted[0]] == order[:4].tolist()
        assert [token for token, _ in got.suppressed[0]] == order[::-1][:4].tolist()
        assert got.promoted[0][0][1] == pytest.approx(logits.max())


def test_feature_logits_of_text_and_of_sites_that_write_nothing(stories):
    final = SparseCoder(sae_config("ln_final.hook_out", 192, 30, k=5), seed=0)
    with torch.no_grad():
        final.W_dec[4] = stories.unembed.weight[stories.to_single_token(" dog")]
    got = feature_logits(stories, final, [4, 5], k=3)
    assert got.promoted[0][0][0] == " dog"
    assert got.logits.shape == (2, stories.d_vocab_real)
    assert "&#x27; dog&#x27;" in got._repr_html_()
    inside = SparseCoder(sae_config("blocks.1.mixer.hook_x", 384, 30, k=5), seed=0)
    with pytest.raises(ValueError, match=r"blocks\.1\.mixer\.hook_x does not reach the logits"):
        feature_logits(stories, inside, 0)
    assert residual_directions(stories, SparseCoder(sae_config("hook_embed", 192, 30, k=5))).shape == (30, 192)


def test_nearest_by_numpy():
    model = tiny()
    a, b = sae_on(model, OUT), mambacoder_on(model, 0, d_sae=16)
    for by, weights in (("decoder", lambda c: c.W_dec), ("encoder", lambda c: c.W_enc.t())):
        rows, other = (weights(c).detach().numpy() for c in (a, b))
        rows, other = (w / np.sqrt((w**2).sum(1, keepdims=True)) for w in (rows, other))
        cosines = rows[[2, 9]] @ rows.T
        cosines[[0, 1], [2, 9]] = -2
        got = nearest_features(a, [2, 9], k=4, by=by)
        np.testing.assert_array_equal(got.features, np.argsort(-cosines, axis=1)[:, :4])
        np.testing.assert_allclose(got.cosines, -np.sort(-cosines, axis=1)[:, :4], rtol=1e-10)
        there = nearest_features(a, 7, k=2, other=b, by=by)
        np.testing.assert_array_equal(there.features[0], np.argsort(-(rows[7] @ other.T))[:2])
    assert nearest_features(a, 0, k=99).features.shape == (1, 23)
    with pytest.raises(ValueError, match="10 and 20 wide"):
        nearest_features(a, 0, other=sae_on(model, "blocks.0.mixer.hook_x"))


def test_a_shuffled_dictionary_is_found_again():
    model = tiny()
    a, b = sae_on(model, OUT), sae_on(model, OUT, d_sae=30)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        b.W_dec[:24] = 3 * a.W_dec[order]
        b.W_dec[24:] = -a.W_dec[:6]
    for pairing in ("hungarian", "mutual"):
        got = compare(a, b, pairing=pairing)
        assert {(int(order[j]), j) for j in range(24)} == {tuple(pair) for pair in got.pairs.tolist()}
        assert got.mean_max_cosine == pytest.approx(1)
        assert got.shared(0.999) == 1
        assert got.only_in_a(0.99) == []
        assert set(got.only_in_b(0.9999)) <= set(range(24, 30))
        assert "24 and 30" in got._repr_html_()
    with torch.no_grad():
        b.W_dec.zero_()
        b.W_dec[0] = a.W_dec[5]
    got = compare_dictionaries(a, b)
    assert got.pairs[0].tolist() == [5, 0]
    assert got.cosines[0] == pytest.approx(1)
    assert set(range(1, 30)) <= set(got.only_in_b(0.01))


def test_two_models_through_one_dictionary():
    a, b = tiny(), tiny()
    with torch.no_grad():
        b.blocks[0].mixer.out_proj.weight *= 1.3
    sae, tokens = sae_on(a, OUT), tokens_for(a, 4, 9)
    mask = torch.ones_like(tokens)
    mask[2, 6:] = 0
    got = compare(a, b, sae, tokens, mask=mask)
    sites = [m.run_with_cache(tokens, names_filter=OUT)[1][OUT][mask.bool()].detach().numpy() for m in (a, b)]
    z = [sae.encode(torch.from_numpy(y)).detach().numpy() for y in sites]
    assert got.tokens == len(z[0]) == 33
    np.testing.assert_allclose(got.mean, np.stack([v.mean(0) for v in z]), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(got.frequency, np.stack([(v != 0).mean(0) for v in z]))
    f = int(np.argmax(np.minimum(z[0].std(0), z[1].std(0))))
    assert float(got.correlation[f]) == pytest.approx(np.corrcoef(z[0][:, f], z[1][:, f])[0, 1], rel=1e-6)
    for i, y in enumerate(sites):
        missed = y - sae(torch.from_numpy(y)).detach().numpy()
        assert got.fvu[i] == pytest.approx(np.sum(missed**2) / np.sum((y - y.mean(0)) ** 2), rel=1e-8)
    change = z[1].mean(0) - z[0].mean(0)
    assert got.changed(1)[0] == (int(np.abs(change).argmax()), pytest.approx(change[np.abs(change).argmax()]))
    assert "33 tokens" in got._repr_html_()
    parts = compare_models(a, b, sae, [tokens[:2], tokens[2:3, :6], tokens[3:]])
    torch.testing.assert_close(parts.mean, got.mean)
    torch.testing.assert_close(parts.correlation, got.correlation)


def test_what_cannot_be_compared():
    model = tiny()
    sae = sae_on(model, OUT)
    with pytest.raises(TypeError, match="pass coder= and tokens="):
        compare(model, model)
    with pytest.raises(TypeError, match="two coders or two models"):
        compare(model, sae)
    with pytest.raises(TypeError, match="by their weights"):
        compare(sae, sae, tokens=tokens_for(model))
    with pytest.raises(ValueError, match="no tokens to compare"):
        compare_models(model, model, sae, [])


def test_positions_count_from_the_last_real_token():
    model = tiny()
    coder = sae_on(model, OUT)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    for mask in (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])):
        read = encode_on(model, coder, tokens, attention_mask=mask)
        last = int(mask[1].nonzero().max())
        assert read.active(1, -1) == read.active(1, last) != []
        assert read.token(1, -1) == int(tokens[1, last])
        with pytest.raises(IndexError, match="row 1 has 2 tokens"):
            read.active(1, -3)
        with pytest.raises(IndexError, match="row 0 has 4 columns"):
            read.token(0, 4)
        assert repr(read).startswith("Activations(2 rows, 6 tokens; ")
