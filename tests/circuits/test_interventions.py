"""Edits of the real model: against a recomputation in numpy, plain hooks, whole passes, and circuits that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import Direction, FrozenModel
from circuits.interventions import (
    CutHead,
    CutTokens,
    ScaleEmbedding,
    ScaleError,
    ScaleFeature,
    ScaleState,
    SetFeature,
    SetState,
    frozen_effects,
    intervened,
)
from hooked_mamba.analysis.cuts import _HELD
from saes import SparseCoder, sae_config, set_features, splice
from tests.circuits.compiled_models import induction, induction_cases, latch, latch_cases
from tests.circuits.models import random_model, random_tokens
from tests.circuits.test_attribution import coders_for
from tests.hooked_mamba.analysis.models import every_family, model_for, two_families
from tests.hooked_mamba.analysis.test_knockout import DenseCuts
from tests.hooked_mamba.reference import forward
from tests.hooked_mamba.tiny import arrays, relative, tokens_for
from tests.kinds import MAMBA

FAMILIES = MAMBA


def coder_for(model, site="blocks.1.mixer.hook_out_proj", seed=0):
    coder = SparseCoder(sae_config(site, model.cfg.d_model, 9, k=4), seed=seed).double()
    with torch.no_grad():
        coder.b_enc.add_(0.3)
    return coder


def until(length, edit):
    """What is left of an edit in a text of some length."""
    names = [name for name in ("positions", "sources", "targets") if hasattr(edit, name)]
    places = {name: getattr(edit, name) for name in names}
    for name, columns in places.items():
        if isinstance(columns, int | list):
            places[name] = [t for t in ([columns] if isinstance(columns, int) else columns) if t < length]
    return replace(edit, **places)


def every_kind(model, coder):
    """One edit of each kind that does something, in both layers of a model."""
    return [
        ScaleEmbedding([0, 2], 0.5), ScaleState(0, [1, 4], 0.5, [0, 3]), SetState(1, 3, 0.4), CutHead(1, [1, 2], 2),
        CutHead(0, [0, 2], [1, 3], slice(3, None), "token"), CutTokens(2, [3, 5], 1), SetFeature(coder, 3, 2.0, [1, 4]),
        ScaleFeature(coder, 5, slice(2, None)), ScaleError(coder, 3, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_edits_that_change_nothing_leave_every_bit(family, data):
    seed, t, e = (data.draw(st.integers(0, top)) for top in (20, 5, 7))
    layer, target = data.draw(st.integers(0, 1)), data.draw(st.sampled_from(["block", "local"]))
    model, tokens = random_model(seed, family, n_layers=2), random_tokens(seed, 2, 6)
    coder = coders_for(model, target)[layer]
    with torch.no_grad():
        plain, cache = model.run_with_cache(tokens)
        z = coder.encode(cache[coder.cfg.in_site])
    edits = [
        ScaleFeature(coder, e, t, 1.0), SetFeature(coder, e, z[..., e], [t]), ScaleError(coder, None, 1.0),
        ScaleEmbedding(slice(t, None), 1), CutHead(layer, [], e), CutTokens([], t, source="scan"),
        CutTokens(t, slice(0, t)), ScaleState(layer, t, 1.0, e), ScaleFeature(coder, e, [], 7.0),
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(edits), min_size=1, max_size=4, unique_by=id))
    with torch.no_grad(), intervened(model, chosen):
        assert torch.equal(model(tokens), plain)


HEADS = {
    "one head": [CutHead(0, 2, 3)],
    "heads of several layers": [CutHead(0, [1, 2], [0, 3]), CutHead(1, 2, 1), CutHead(1, [2, 4], [1, 2], [4, 6])],
    "heads of tokens": [CutHead(0, 1, [0, 2], slice(2, 5), "token"), CutHead(1, 3, 2, source="token")],
    "heads and tokens": [
        CutTokens([1, 3], [3, 4], [0, 1]), CutHead(1, 3, [1, 2], [3, 4, 5]), CutTokens(2, 5, 0, "scan"),
    ],
}  # fmt: skip


@every_family
@pytest.mark.parametrize("name", HEADS)
def test_cuts_equal_a_recomputation_from_dense_matrices(family, name):
    model = model_for(family)
    tokens = tokens_for(model, rows=2)

    def places(positions):
        if positions is None or isinstance(positions, slice):
            return list(range(7))[positions or slice(None)]
        return [positions] if isinstance(positions, int) else positions

    edits = {}
    for layer in range(2):
        cuts = []
        for edit in HEADS[name]:
            layers = [edit.layer] if isinstance(edit, CutHead) else places(edit.layers)
            if layer in layers:
                channels = [places(edit.channels)] if isinstance(edit, CutHead) else []
                cuts.append((places(edit.sources), places(edit.targets), edit.source, "read", *channels))
        edits |= DenseCuts(model, layer, cuts).edits()
    expected = forward(model.cfg, arrays(model.state_dict()), tokens.numpy(), edits).logits
    with intervened(model, HEADS[name]):
        got = model(tokens)
    assert relative(got, expected) < 1e-12
    assert relative(got, model(tokens).numpy()) > 1e-5


@two_families
def test_without_any_flow_a_target_reads_nothing(family):
    model = model_for(family, conv_bias=False)
    tokens = tokens_for(model, rows=2)

    def clear(y, hook):
        y[:, [3, 5]] = 0

    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.*.mixer.hook_y", clear)])
    for source in ("token", "scan"):
        with intervened(model, CutTokens(None, [3, 5], source=source)):
            assert relative(model(tokens), expected.numpy()) < 1e-12
        with intervened(model, [CutTokens(s, [3, 5], source=source) for s in range(6)]):
            assert relative(model(tokens), expected.numpy()) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_latents_of_one_coder_are_edited_together(family):
    model, tokens = random_model(5, family, n_layers=2), random_tokens(5, 2, 6)
    coder = coder_for(model)
    with set_features(model, coder, {3: 2.0}, [1, 4]):
        expected = model(tokens)
    with intervened(model, SetFeature(coder, 3, 2.0, [1, 4])):
        assert torch.equal(model(tokens), expected)

    def by_hand(z):
        z[:, 1, 3] = 2.0
        z[:, 2:, 3] *= 0.5
        z[:, 4, 5] = 0
        z[:, 4, 3] = -1.0
        return z

    edits = [
        SetFeature(coder, 3, 2.0, 1), ScaleFeature(coder, 3, slice(2, None), 0.5), ScaleFeature(coder, 5, 4),
        SetFeature(coder, 3, -1.0, 4),
    ]  # fmt: skip
    with splice(model, coder, error=True, features=by_hand):
        expected = model(tokens)
    with intervened(model, edits):
        assert torch.allclose(model(tokens), expected, atol=1e-12)
    with splice(model, coder, features=by_hand):
        expected = model(tokens)
    with intervened(model, [ScaleError(coder), *edits]):
        assert torch.allclose(model(tokens), expected, atol=1e-12)


@two_families
def test_states_are_edited_as_by_hooks(family):
    model = model_for(family)
    tokens = tokens_for(model, rows=2)
    cfg = model.cfg
    shape = (cfg.H, cfg.P, cfg.d_state) if hasattr(cfg, "head_dim") else (cfg.E, cfg.d_state)
    value = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def halve(h, hook):
        h.view(2, cfg.E, -1)[:, [0, 3]] *= 0.5

    def put(h, hook):
        return value

    hooks = [("blocks.0.mixer.hook_h.2", halve), ("blocks.0.mixer.hook_h.-3", halve), ("blocks.1.mixer.hook_h.3", put)]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    with intervened(model, [ScaleState(0, [2, -3], 0.5, [0, 3]), SetState(1, slice(3, 4), value)]):
        assert torch.equal(model(tokens), expected)
    with intervened(model, [ScaleState(1, 3, 5.0), SetState(1, 3, value)]):
        again = model(tokens)
    assert torch.equal(again, model.run_with_hooks(tokens, fwd_hooks=hooks[2:]))


@two_families
def test_what_is_cut_has_gone_through_the_edits_of_its_state(family):
    model = model_for(family)
    tokens = tokens_for(model, rows=2)
    scale, head = ScaleState(0, [2, 4], 0.5), CutHead(0, 1, [2, 3])

    def y_with(*edits):
        with intervened(model, edits):
            return model.run_with_cache(tokens)[1]

    plain, with_cut = y_with(scale), y_with(scale, head)
    view = plain.scan_view(0)
    alpha = plain.hidden_attention(0).repeat_interleave(view.u.shape[3], 1)
    lost = (plain["y", 0] - with_cut["y", 0]).flatten(2)
    factor = torch.tensor([1, 1, 0.5, 0.5, 0.25, 0.25, 0.25], dtype=torch.float64)
    for e in range(model.cfg.E):
        term = alpha[:, e, :, 1] * view.u.flatten(2)[:, 1, e, None] * factor if e in (2, 3) else torch.zeros(2, 7)
        skip = view.D.repeat_interleave(view.u.shape[3])[e] * view.u.flatten(2)[:, 1, e]
        if e in (2, 3):  # the skip passes no state
            term[:, 1] = alpha[:, e, 1, 1] * view.u.flatten(2)[:, 1, e]
            assert relative(term[:, 1] - skip, (lost[:, 1, e] - skip).numpy()) < 1e-10
        assert torch.allclose(lost[..., e], term.double(), atol=1e-12)
    forgotten = SetState(0, 3, 0.0)
    with intervened(model, forgotten):
        expected = model(tokens)
    with intervened(model, [forgotten, CutHead(0, [0, 1, 3], targets=slice(4, None))]):
        assert relative(model(tokens), expected.numpy()) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generating_is_reading_the_whole_text_with_the_same_edits(family):
    model, tokens = random_model(7, family, n_layers=2), random_tokens(7, 2, 4)
    coder = coder_for(model)
    later = [
        ScaleState(1, [2, 6], 0.5), CutTokens([1, 5], slice(6, None)), SetFeature(coder, 2, 1.5, 6), CutHead(0, 6, 1),
        ScaleEmbedding(5, 0.3),
    ]  # fmt: skip
    never = [SetState(0, 50, 1.0), CutHead(1, 40), SetFeature(coder, 1, 5.0, 33), CutTokens(0, 60)]
    seen = []
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    watch = model.hooks([("hook_logits", lambda x, hook: seen.append(x.clone()))])
    with intervened(model, [*every_kind(model, coder), *later, *never]), watch:
        made = model.generate(tokens, 5, **options)
    with intervened(model, [*every_kind(model, coder), *later]):
        whole = model(made[:, :-1])
    for t in range(4, 9):  # outside of `generate`, a column that is not there is an error
        with intervened(model, [until(t, edit) for edit in (*every_kind(model, coder), *later)]):
            assert torch.equal(model(made[:, :t])[:, -1].argmax(-1), made[:, t])
    assert torch.allclose(torch.cat(seen, 1), whole, atol=1e-11)
    assert not torch.allclose(whole, model(made[:, :-1]), atol=1e-3)
    clean = model.generate(tokens, 5, **options)
    with intervened(model, never):
        assert torch.equal(model.generate(tokens, 5, **options), clean)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_and_padding(family):
    model, tokens = random_model(5, family, n_layers=2), random_tokens(5, 2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    coder = coder_for(model)
    sources = torch.zeros(2, 7, dtype=torch.bool)
    sources[0, 1] = sources[1, 4] = True
    edits = [
        CutTokens(sources, -1),
        SetFeature(coder, 2, 1.5, [1, 4]),
        ScaleState(0, 4, 0.5),
        CutHead(1, sources, [1, 2]),
    ]
    with intervened(model, edits):
        got = model(tokens, attention_mask=mask)
    for row, real in ((0, slice(None)), (1, slice(2, None))):
        shift = 2 * row
        source = 1 if row == 0 else 2
        places = [1, 4] if row == 0 else [2]  # column 1 of row 1 is padding
        alone = [
            CutTokens(source, -1), SetFeature(coder, 2, 1.5, places), ScaleState(0, 4 - shift, 0.5),
            CutHead(1, source, [1, 2]),
        ]  # fmt: skip
        with intervened(model, alone):
            assert torch.allclose(got[row, real], model(tokens[row : row + 1, real])[0], atol=1e-11)


@torch.no_grad()
def test_in_the_last_layer_free_and_frozen_are_one():
    """Mamba-1's last layer is affine in what is edited here, so nothing downstream makes a difference."""
    model, tokens = random_model(5, "mamba", n_layers=2), random_tokens(5, 2, 6)
    coder = coder_for(model)
    vector = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    edits = [
        CutHead(1, [1, 2], [0, 2]), CutTokens(3, 5, 1), ScaleState(1, 3, 0.5), SetState(1, 4, 0.2, [1]),
        SetFeature(coder, 2, 1.5, 5), ScaleFeature(coder, 4),
    ]  # fmt: skip
    for some in (edits[:4], edits[4:]):
        effect = frozen_effects(FrozenModel(model, tokens), some, Direction(vector, 1, 5, "out"))[0]
        outs = []
        for now in ([], some):
            with intervened(model, now):
                outs.append(model.run_with_cache(tokens)[1]["blocks.1.mixer.hook_out_proj"][:, 5] @ vector)
        assert torch.allclose(effect, outs[1] - outs[0], atol=1e-12)
        assert effect.abs().max() > 1e-3


@pytest.mark.parametrize("via", ["marker", "value"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_right_head_at_the_right_source_is_all_that_the_latch_needs(family, via):
    compiled = latch(family, via, 0, distractors=True, turned=True)
    model = compiled.model
    for case in latch_cases(2, via, 0):
        channel, length = compiled.channel_of[case.answer], case.tokens.shape[1]

        def answer(edit, case=case):
            with intervened(model, edit):
                return int(model(case.tokens)[0, -1].argmax())

        assert answer([]) == case.answer
        assert answer(CutHead(0, case.scan_at, channel, -1)) != case.answer
        assert answer(CutTokens(case.value_at, -1)) != case.answer
        others = [[e for e in range(model.cfg.E) if e != channel or s != case.scan_at] for s in range(length)]
        for s in range(length):
            assert answer(CutHead(0, s, others[s], -1)) == case.answer
            assert answer(CutHead(0, s, channel, -1)) == case.answer or s == case.scan_at
        assert answer([CutHead(0, s, others[s], -1) for s in range(length)]) == case.answer


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_induction_model_answers_by_one_head(family):
    compiled = induction(family, 0, turned=True)
    model = compiled.model
    for case in induction_cases(2, 0):
        channel = compiled.channel_of[case.answer]

        def answer(edit, case=case):
            with intervened(model, edit):
                return int(model(case.tokens)[0, -1].argmax())

        assert answer([]) == case.answer
        assert answer(CutHead(1, case.scan_at, channel, -1)) != case.answer
        for s in range(case.tokens.shape[1]):
            for e in range(model.cfg.E):
                if (s, e) != (case.scan_at, channel):
                    assert answer(CutHead(1, s, e, -1)) == case.answer


@torch.no_grad()
def test_nothing_is_left_behind():
    model, tokens = random_model(5, "mamba", n_layers=2), random_tokens(5, 1, 6)
    edits = every_kind(model, coder_for(model))
    plain = model(tokens)

    def clean():
        hooks = any(point.wanted for point in model.hook_points())
        return not hooks and not any(b._forward_pre_hooks for b in model.blocks) and not _HELD.get(model)

    def interrupted():
        with intervened(model, edits):
            assert not torch.allclose(model(tokens), plain)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert clean()
    with pytest.raises(IndexError, match="position 9"), intervened(model, [*edits, CutHead(1, 9)]):
        model(tokens)
    assert clean()
    with pytest.raises(IndexError), intervened(model, [*edits, ScaleState(1, 9)]):
        model(tokens)
    assert clean()
    assert torch.equal(model(tokens), plain)


def test_what_is_refused(unchecked):
    model = random_model(5, "mamba", n_layers=2)
    coder, other = coder_for(model), SparseCoder(sae_config("blocks.0.hook_resid_pre", 99, 7, k=2), seed=0)
    refused = [
        (IndexError, "layer 2 is out of range", CutHead(2, 0)),
        (IndexError, "layer -3 is out of range", CutTokens(0, layers=[0, -3])),
        (IndexError, "channel 99 is out of range", CutHead(0, 0, [0, 99])),
        (IndexError, "channel 99 is out of range", ScaleState(0, 0, channels=99)),
        (IndexError, "feature 9 is out of range", SetFeature(coder, 9, 1.0)),
        (ValueError, "holds 99 numbers per position", ScaleFeature(other, 1)),
        (ValueError, "source must be 'scan' or 'token', got 'tokens'", CutHead(0, 0, source="tokens")),
        (ValueError, "slice from 0 or more to an end, got None", ScaleState(0, None)),
        (ValueError, "slice from 0 or more to an end, got slice", ScaleState(0, slice(2, None))),
        (ValueError, "a state of layer 1 is", SetState(1, 0, torch.zeros(3, 5, 7))),
        (TypeError, "expected an edit .ScaleFeature, .* got int: 3", 3),
    ]  # fmt: skip
    for kind, match, edit in refused:
        with pytest.raises(kind, match=match), intervened(model, [edit]):
            pass
    with pytest.raises(TypeError, match="expected an edit"), intervened(model, "cut"):
        pass
    many = [CutHead(0, 0, targets=t) for t in range(63)]
    with pytest.raises(ValueError, match="63 cuts apply in one layer, at most 62"), intervened(model, many):
        model(random_tokens(5, 1, 64))
    joined = [CutHead(0, s, targets=slice(1, None)) for s in range(64)]
    with intervened(model, joined):
        assert model(random_tokens(5, 1, 64)).isfinite().all()
