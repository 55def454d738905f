"""Latents turned up, down and off, against edits of the site written out."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba.analysis.columns import columns_before
from saes.steering import ablate, scale_features, set_features, steer
from tests.hooked_mamba.tiny import tokens_for
from tests.kinds import MIXERS
from tests.saes.models import mambacoder_on, sae_on, tiny

OUT = "blocks.1.mixer.hook_out_proj"
KINDS = ("sae", "mambacoder", "local", "gated", "jumprelu", "batchtopk")


def coder_of(kind, model):
    if kind in ("mambacoder", "local"):
        return mambacoder_on(model, 1, target="local" if kind == "local" else "block", skip=True)
    coder = sae_on(model, OUT, architecture="topk" if kind == "sae" else kind)
    if kind == "batchtopk":
        coder.threshold.fill_(0.3)
    return coder


def by_hand(model, coder, tokens, change):
    """Logits with `change(z) -> dz` decoded and added at the coder's site, and the latents."""
    site = coder.cfg.in_site
    _, cache = model.run_with_cache(tokens, names_filter=[site, OUT])
    z = coder.encode(cache[site])
    new = cache[OUT] + change(z) @ coder.W_dec
    return model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda value, hook: new)]), z


def one(z, feature, values):
    dz = torch.zeros_like(z)
    dz[..., feature] = values
    return dz


def strongest(model, coder, tokens) -> int:
    """A latent that is active somewhere."""
    return int(by_hand(model, coder, tokens, torch.zeros_like)[1].amax((0, 1)).argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_site_edited_by_hand(kind):
    model = tiny()
    coder, tokens = coder_of(kind, model), tokens_for(model)
    f = strongest(model, coder, tokens)
    clean = model(tokens)
    cases = [
        (steer(model, coder, f, 3.0), lambda z: one(z, f, 3.0)),
        (steer(model, coder, [f, 5], [3.0, -1]), lambda z: one(z, f, 3.0) + one(z, 5, -1.0)),
        (steer(model, coder, [f, 5], 2), lambda z: one(z, f, 2.0) + one(z, 5, 2.0)),
        (ablate(model, coder, f), lambda z: one(z, f, -z[..., f])),
        (ablate(model, coder, [f, 0], 0.25), lambda z: one(z, f, -z[..., f] / 4) + one(z, 0, -z[..., 0] / 4)),
        (set_features(model, coder, {f: 4.0}), lambda z: one(z, f, 4 - z[..., f])),
        (scale_features(model, coder, {f: 5.0}), lambda z: one(z, f, 4 * z[..., f])),
    ]
    for context, change in cases:
        expected, _ = by_hand(model, coder, tokens, change)
        with context:
            torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        assert (expected - clean).abs().max() > 1e-3
    assert torch.equal(model(tokens), clean)


def test_only_where_asked():
    model = tiny()
    coder, tokens = coder_of("sae", model), tokens_for(model)
    amounts = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6]])

    def at_two(z):
        dz = torch.zeros_like(z)
        dz[:, 2, 3] = 1.5
        return dz

    expected, _ = by_hand(model, coder, tokens, at_two)
    with steer(model, coder, 3, 1.5, positions=2):
        torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
    expected, _ = by_hand(model, coder, tokens, lambda z: one(z, 3, amounts.double()))
    with steer(model, coder, 3, amounts):
        torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", MIXERS)
def test_generation_follows(family):
    """Greedy tokens under steering and ablation are those of whole passes under it, and differ from the clean ones."""
    model = tiny(family)
    prompt = tokens_for(model, 2, 4)
    coder = sae_on(model, OUT)
    f = strongest(model, coder, prompt)

    def generate(new=6):
        return model.generate(prompt, max_new_tokens=new, do_sample=False, verbose=False, stop_at_eos=False)

    clean = generate()
    changed = 0
    for context in (
        lambda: steer(model, coder, f, 25.0),
        lambda: ablate(model, coder, [f, 1, 2, 3], 30.0),
        lambda: set_features(model, coder, {7: 40.0}),
    ):
        with context():
            made = generate()
            again = model(made[:, :-1])
        assert torch.equal(again[:, 3:].argmax(-1), made[:, 4:])
        changed += int(not torch.equal(made, clean))
    assert changed == 3
    assert torch.equal(generate(), clean)


def test_positions_in_generate():
    """From the prompt's first column on; -1 is the newest token of every call; masks are the prompt's."""
    model = tiny()
    prompt, coder = tokens_for(model, 1, 4), sae_on(model, OUT)
    seen = []

    def columns(positions):
        """Which columns of the final text were changed."""
        touched, clean = [], {}

        def before(value, hook):
            clean["value"] = value.clone()

        def after(value, hook):
            start = columns_before(model)
            moved = (value - clean["value"]).abs().sum((0, 2)) > 0
            touched.extend((start + moved.nonzero().flatten()).tolist())

        with model.hooks([(OUT, before)]), steer(model, coder, 2, 1.0, positions), model.hooks([(OUT, after)]):
            made = model.generate(prompt, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
        seen.append(made)
        return touched

    assert columns(None) == [0, 1, 2, 3, 4, 5, 6]
    assert columns(2) == [2]
    assert columns([1, 5]) == [1, 5]
    assert columns(torch.tensor([1, 5])) == [1, 5]
    assert columns(-1) == [3, 4, 5, 6]
    assert columns(slice(4, None)) == [4, 5, 6]
    assert columns(slice(None, 6, 2)) == [0, 2, 4]
    assert columns(torch.tensor([[False, True, True, False]])) == [1, 2]
    with pytest.raises(ValueError, match="no end yet"):
        columns(slice(-2, None))
    assert columns_before(model) is None


def test_wrong_features(unchecked):
    model = tiny()
    coder = sae_on(model, OUT)
    with pytest.raises(IndexError, match="feature 24 is out of range: this coder has 24"):
        steer(model, coder, 24).__enter__()
    with pytest.raises(IndexError, match="feature -1"):
        ablate(model, coder, -1).__enter__()
    with pytest.raises(ValueError, match="2 features and 3 scales"):
        steer(model, coder, [1, 2], [1.0, 2.0, 3.0]).__enter__()
    with pytest.raises(ValueError, match="no feature"):
        ablate(model, coder, []).__enter__()
