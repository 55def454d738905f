"""Coders in the model's place, against forwards taken apart by hand."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba.hooks.names import HookNameError
from saes import SparseCoder
from saes.splicing import LatentEdit, misses, splice
from saes.targets import local_part, sites_of
from tests.hooked_mamba.tiny import tokens_for
from tests.saes.models import mambacoder_on, sae_on, tiny

FAMILIES = ("mamba", "mamba2-groups")
OUT = "blocks.0.mixer.hook_out_proj"
INSIDE = ("blocks.1.mixer.hook_dt", "blocks.0.mixer.hook_x", "blocks.1.mixer.hook_h")
SITES = ("hook_embed", OUT, *INSIDE, "ln_final.hook_out")


def hooks_left(model) -> int:
    points = sum(len(p.fwd_hooks) + len(p.readers) for p in model.hook_points())
    return points + sum(len(block._forward_pre_hooks) for block in model.blocks)


def exact(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_an_sae_stands_in_for_its_site(family, site):
    model = tiny(family)
    tokens, sae = tokens_for(model), sae_on(model, site)
    _, cache = model.run_with_cache(tokens, names_filter=site)
    said = sae(cache[site].flatten(2)).reshape(cache[site].shape)
    expected = model.run_with_hooks(tokens, fwd_hooks=[(site, lambda value, hook: said)])
    with splice(model, sae):
        exact(model(tokens), expected)
        _, spliced = model.run_with_cache(tokens, names_filter=site)
    exact(spliced[site], said)
    assert (model(tokens) - expected).abs().max() > 1e-3
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reads", ["normalized", "resid"])
def test_mambacoders_of_all_blocks_run_in_order(family, reads):
    """The model by hand: residual, norm, prediction, sum; each coder reads what the one before it has made."""
    model = tiny(family)
    coders = [mambacoder_on(model, layer, reads=reads, skip=True) for layer in range(2)]
    tokens = tokens_for(model)
    resid = model.embed.weight[tokens]
    for block, coder in zip(model.blocks, coders, strict=True):
        n = resid / (resid.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
        x = n if reads == "normalized" else resid
        z = torch.zeros(*x.shape[:-1], 24, dtype=x.dtype)
        top = (x @ coder.W_enc + coder.b_enc).topk(3)
        z.scatter_(-1, top.indices, top.values.relu())
        resid = resid + z @ coder.W_dec + coder.b_dec + x @ coder.W_skip
    final = model.ln_final
    resid = resid / (resid.square().mean(-1, keepdim=True) + final.eps).sqrt() * final.weight
    with splice(model, coders):
        exact(model(tokens), resid @ model.unembed.weight.t())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_coder_replaces_the_local_part_alone(family):
    model = tiny(family)
    coder, tokens = mambacoder_on(model, 0, target="local"), tokens_for(model)
    _, cache = model.run_with_cache(
        tokens, names_filter=[*sites_of(f"{OUT}@local", model), "blocks.0.norm.hook_out", OUT]
    )
    new = cache[OUT] - local_part(model, 0, cache) + coder(cache["blocks.0.norm.hook_out"])
    expected = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda value, hook: new)])
    with splice(model, coder):
        exact(model(tokens), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_error_nothing_changes_and_edits_do(family):
    model = tiny(family)
    tokens = tokens_for(model)
    local = mambacoder_on(model, 0, target="local")
    coders = {"sae": sae_on(model, OUT), "coder": mambacoder_on(model, 1), "local": local}
    clean = model(tokens)
    with splice(model, coders, error=True) as spliced:
        assert torch.equal(model(tokens), clean)
    assert spliced.coders == coders
    with splice(model, coders, error=True, features={"sae": lambda z: z, "local": lambda z: z}):
        exact(model(tokens), clean)

    _, cache = model.run_with_cache(tokens, names_filter=OUT)
    z = coders["sae"].encode(cache[OUT])
    changed = cache[OUT] + z[..., 5:9].sum(-1, keepdim=True) * coders["sae"].W_dec[7]
    expected = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda value, hook: changed)])

    def edit(z):
        z[..., 7] += z[..., 5:9].sum(-1)  # in place
        return z

    with splice(model, coders["sae"], error=True, features=edit):
        exact(model(tokens), expected)
    assert (expected - clean).abs().max() > 1e-3


def test_edits_without_the_error_and_recorded_latents():
    model = tiny()
    sae, tokens = sae_on(model, OUT), tokens_for(model)
    _, cache = model.run_with_cache(tokens, names_filter=OUT)
    z = sae.encode(cache[OUT])
    z[..., 4] = 2.5
    expected = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda value, hook: sae.decode(z))])
    edit = LatentEdit((4,), lambda values: 2.5 - values)
    with splice(model, sae, features=edit, record=True) as spliced:
        exact(model(tokens), expected)
    exact(spliced.latents["l0-out_proj"], z)
    with splice(model, sae, error=True, record=True) as spliced:
        model(tokens)
    exact(spliced.latents["l0-out_proj"], sae.encode(cache[OUT]))


def test_edits_of_two_coders_at_one_site_add_up_and_recording_changes_nothing():
    model = tiny()
    coders = {"sae": sae_on(model, OUT), "coder": mambacoder_on(model, 0)}
    tokens = tokens_for(model)
    _, cache = model.run_with_cache(tokens, names_filter=[OUT, "blocks.0.norm.hook_out"])
    z = coders["coder"].encode(cache["blocks.0.norm.hook_out"])
    f = int(z.detach().amax((0, 1)).argmax())
    sum_of_both = cache[OUT] + 4 * coders["sae"].W_dec[3] - z[..., f : f + 1] * coders["coder"].W_dec[f]
    expected = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda value, hook: sum_of_both)])
    edits = {"sae": LatentEdit((3,), lambda z: 0 * z + 4), "coder": LatentEdit((f,), lambda z: -z)}
    for record in (False, True):
        with splice(model, coders, error=True, features=edits, record=record) as spliced:
            exact(model(tokens), expected)
        assert set(spliced.latents) == (set(coders) if record else set())
    assert (spliced.latents["coder"][..., f] == 0).all()


def test_errors_of_another_pass_are_held_fixed():
    model = tiny()
    coders = [mambacoder_on(model, 0), sae_on(model, "blocks.1.hook_resid_post")]
    tokens, other = tokens_for(model), tokens_for(model, seed=5)
    errors = misses(model, coders, tokens)
    with splice(model, coders, error=errors):
        logits = model(tokens)
        moved = model(other)
    exact(logits, model(tokens))

    _, cache = model.run_with_cache(other, names_filter="blocks.0.norm.hook_out")

    def mixed(value, hook):
        return coders[0](cache["blocks.0.norm.hook_out"]) + errors["l0-mambacoder"]

    def post(value, hook):
        return coders[1](value) + errors["l1-resid_post"]

    exact(moved, model.run_with_hooks(other, fwd_hooks=[(OUT, mixed), ("blocks.1.hook_resid_post", post)]))
    with pytest.raises(ValueError, match="frozen errors"), splice(model, coders, error=errors):
        model(tokens[:, :3])
    with pytest.raises(ValueError, match="lacks the errors of l1-resid_post"):
        splice(model, coders, error={"l0-mambacoder": errors["l0-mambacoder"]}).__enter__()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["x", "dt", "x_pre", "out_proj"])
def test_padding_stays_padding(family, site):
    """Every row of a padded batch gets what it would get alone, at sites behind the masks too."""
    model = tiny(family)
    sae = sae_on(model, f"blocks.0.mixer.hook_{site}")
    short, long = tokens_for(model, 1, 4), tokens_for(model, 1, 9, seed=2)
    for side in ("left", "right"):
        tokens, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
        here = slice(5, 9) if side == "left" else slice(0, 4)
        tokens[0, here], mask[0, here] = short[0], 1
        tokens[1], mask[1] = long[0], 1
        with splice(model, [sae, mambacoder_on(model, 1, target="local")]):
            batch = model(tokens, attention_mask=mask)
            exact(batch[0, here], model(short)[0])
            exact(batch[1], model(long)[0])
            assert (batch[1] - model(tokens_for(model, 1, 9, seed=3))[0]).abs().max() > 1e-3


def test_in_generate_as_in_one_pass_over_all():
    model = tiny()
    coders = [mambacoder_on(model, 0), sae_on(model, "blocks.1.mixer.hook_x")]
    prompt = tokens_for(model, 2, 5)
    with splice(model, coders):
        made = model.generate(prompt, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
        whole = model(made[:, :-1])
    assert torch.equal(whole[:, 4:].argmax(-1), made[:, 5:])
    clean = model.generate(prompt, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
    assert not torch.equal(made, clean)
    assert hooks_left(model) == 0


def test_padded_prompts_generate_what_each_would_alone():
    model = tiny()
    coders = [sae_on(model, "blocks.0.mixer.hook_x"), mambacoder_on(model, 1)]
    short, long = tokens_for(model, 1, 4), tokens_for(model, 1, 7, seed=2)
    tokens, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    tokens[0, 3:], mask[0, 3:], tokens[1], mask[1] = short[0], 1, long[0], 1
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with splice(model, coders):
        both = model.generate(tokens, attention_mask=mask, **options)
        for row, alone in ((0, short), (1, long)):
            assert torch.equal(both[row, 7:], model.generate(alone, **options)[0, alone.shape[1] :])


def test_positions():
    model = tiny()
    sae, tokens = sae_on(model, OUT), tokens_for(model)
    _, clean = model.run_with_cache(tokens, names_filter=OUT)
    said = sae(clean[OUT])
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3], mask[1, 1:4] = True, True
    chosen = [
        (2, [(slice(None), 2)]),
        (-1, [(slice(None), 6)]),
        ((0, 3), [(slice(None), 0), (slice(None), 3)]),
        (slice(4, None), [(slice(None), slice(4, 7))]),
        (slice(-2, None), [(slice(None), slice(5, 7))]),
        (mask, [(0, 3), (1, slice(1, 4))]),
    ]
    for positions, places in chosen:
        expected = clean[OUT].clone()
        for place in places:
            expected[place] = said[place]
        with splice(model, sae, positions=positions):
            _, cache = model.run_with_cache(tokens, names_filter=OUT)
        exact(cache[OUT], expected)
    with pytest.raises(IndexError, match="position 7"), splice(model, sae, positions=7):
        model(tokens)


def test_hooks_go_after_exceptions():
    model = tiny()

    def wrong(z):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), splice(model, [sae_on(model, OUT)], features=wrong):
        model(tokens_for(model))
    assert hooks_left(model) == 0
    short = splice(model, sae_on(model, OUT), features=lambda z: z[..., :3])
    with pytest.raises(ValueError, match="must return all of them"), short:
        model(tokens_for(model))
    assert hooks_left(model) == 0


def test_what_does_not_fit_is_said_at_once(unchecked):
    model = tiny()
    sae = sae_on(model, OUT)

    def elsewhere(site):
        return SparseCoder(sae.cfg.replace(in_site=site, out_site=site))

    wrong = [
        (HookNameError, r"blocks\.7", elsewhere("blocks.7.hook_resid_pre"), {}),
        (ValueError, "of this model holds 3", elsewhere("blocks.0.mixer.hook_B"), {}),
        (ValueError, "l0-out_proj and l0-mambacoder both replace", [sae, mambacoder_on(model, 0)], {}),
        (IndexError, "feature 24 is out of range", sae, {"features": LatentEdit((24,), lambda z: z)}),
        (ValueError, "named twice", sae, {"features": LatentEdit((2, 2), lambda z: z)}),
        (KeyError, "no coder is called 'l0-out'; nearest: l0-out_proj", [sae], {"features": {"l0-out": abs}}),
        (KeyError, "several coders, name one of", [sae, mambacoder_on(model, 1)], {"features": abs}),
        (TypeError, "got str among them", [sae, "l1"], {}),
        (TypeError, "a list of coders", "l1", {}),
        (TypeError, "error must be True, False or errors by name, got str", sae, {"error": "yes"}),
        (ValueError, "no coders", [], {}),
    ]
    for error, message, coders, options in wrong:
        with pytest.raises(error, match=message):
            splice(model, coders, **options).__enter__()
    assert hooks_left(model) == 0


def test_gradients_reach_the_model_through_the_coders():
    """With the error and latents of its own, the loss's gradient at a latent is its decoder row's share."""
    model = tiny()
    sae, tokens = sae_on(model, OUT), tokens_for(model)
    leaves = []

    def as_leaf(z):
        leaves.append(z.detach().requires_grad_())
        return leaves[-1]

    with splice(model, sae, error=True, features=as_leaf):
        loss = model(tokens, return_type="loss")
    (gradient,) = torch.autograd.grad(loss, leaves[-1])
    _, cache = model.run_with_cache(tokens, names_filter=OUT, incl_bwd=True, return_type="loss")
    exact(gradient, cache[f"{OUT}_grad"] @ sae.W_dec.detach().t())


def test_half_precision_models_and_single_precision_coders():
    model = tiny().float().bfloat16()
    sae, tokens = sae_on(model, OUT).float(), tokens_for(model)
    with splice(model, sae) as spliced:
        assert model(tokens).isfinite().all()
    with splice(model, sae, error=True, features=LatentEdit((1,), lambda z: z * 0)):
        assert torch.equal(model(tokens), spliced.model(tokens))
