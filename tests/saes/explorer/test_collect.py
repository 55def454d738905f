"""What the explorer collects in a stream, against everything computed at once."""

from __future__ import annotations

import pytest
import torch

from saes import SparseCoder, sae_config
from saes.explorer import collect, explore
from saes.explorer.directions import neighbours, token_rankings
from saes.explorer.tally import OUTSIDE, Tally
from saes.options import OptionError
from saes.store.data import DataConfig, rows_of
from saes.store.rows import take
from tests.hooked_mamba.tiny import build
from tests.kinds import MAMBA
from tests.saes.explorer import explored

OPTIONS = {"context_length": 13, "top": 3, "sampled": 5, "before": 4, "after": 2, "progress": False}


def dense(model, coder, tokens):
    """All latents, rows in the order in which they were given."""
    _, cache = model.run_with_cache(tokens, names_filter=[coder.cfg.in_site])
    return coder.encode(cache[coder.cfg.in_site]).detach()


def in_order(tokens):
    """Rows in the order in which they were read: documents are shuffled."""
    source = rows_of(tokens, explored.model(), DataConfig(context_length=tokens.shape[1], epochs=1))
    return take(source, len(tokens)).tokens


@pytest.fixture(scope="module")
def case():
    model, coder, tokens = explored.model(), explored.sae(), explored.text()
    data = collect(model, {"mine": coder}, tokens, rows_per_pass=2, **OPTIONS)["mine"]
    tokens = in_order(tokens)
    return model, coder, tokens, data, dense(model, coder, tokens)


def test_counts_and_sizes(case):
    _, _, tokens, data, z = case
    assert data.n_tokens == tokens.numel()
    assert data.counts.tolist() == (z > 0).sum((0, 1)).tolist()
    torch.testing.assert_close(data.largest, z.amax((0, 1)))
    means = z.sum((0, 1)) / (z > 0).sum((0, 1)).clamp(min=1)
    torch.testing.assert_close(data.means, means)
    torch.testing.assert_close(data.density, (z > 0).double().mean((0, 1)))
    assert data.histogram.sum(1).tolist() == data.counts.tolist()


def test_the_strongest_contexts_are_the_largest_row_maxima(case):
    _, _, tokens, data, z = case
    top = data.top
    peaks = z.max(1)
    for f in range(z.shape[2]):
        order = peaks.values[:, f].argsort(descending=True, stable=True)[:3]
        for slot, row in enumerate(order.tolist()):
            value = float(peaks.values[row, f])
            if value == 0:
                assert (top.values[f, slot], top.rows[f, slot]) == (0, OUTSIDE)
                continue
            t = int(peaks.indices[row, f])
            assert (top.rows[f, slot], top.positions[f, slot]) == (row, t)
            assert float(top.values[f, slot]) == pytest.approx(value)
            for i, place in enumerate(range(t - 4, t + 3)):
                inside = 0 <= place < tokens.shape[1]
                assert int(top.tokens[f, slot, i]) == (int(tokens[row, place]) if inside else OUTSIDE)
                assert float(top.activations[f, slot, i]) == pytest.approx(float(z[row, place, f]) if inside else 0)


def test_the_sample_is_of_active_positions_each_at_most_once(case):
    _, _, _, data, z = case
    sampled = data.sampled
    for f in range(z.shape[2]):
        used = sampled.values[f] > 0
        assert int(used.sum()) == min(5, int((z[..., f] > 0).sum()))
        places = list(zip(sampled.rows[f][used].tolist(), sampled.positions[f][used].tolist(), strict=True))
        assert len(set(places)) == len(places)
        for slot, (row, t) in enumerate(places):
            assert float(sampled.values[f, slot]) == pytest.approx(float(z[row, t, f]))
        assert sampled.values[f].tolist() == sorted(sampled.values[f].tolist(), reverse=True)


def test_the_sample_is_uniform(unchecked):
    """Every active position comes equally often: over many seeds, its share is that of drawing 5 of n."""
    model, coder, tokens = explored.model(), explored.sae(F=6, k=6), explored.text(4, 13)
    hits = torch.zeros(4 * 13)
    for seed in range(60):
        tally = Tally(6, top=0, sampled=5, seed=seed)
        z = dense(model, coder, tokens)
        everywhere = torch.ones(tokens.shape, dtype=torch.bool)
        tally.add(z, tokens, everywhere, everywhere)
        found = tally.contexts(tally.sampled)
        hits += torch.bincount((found.rows[0] * 13 + found.positions[0]), minlength=52)
    active = z[..., 0].flatten() > 0
    n = int(active.sum())
    assert n > 10
    assert (hits[~active] == 0).all()
    expected = 60 * 5 / n
    chi2 = float(((hits[active] - expected) ** 2 / (expected * (1 - 5 / n))).sum())
    assert chi2 < n + 5 * (2 * n) ** 0.5  # five standard deviations of chi squared with n degrees of freedom


@pytest.mark.parametrize("rows_per_pass", [1, 4, 16])
def test_the_size_of_passes_changes_nothing(case, rows_per_pass):
    model, coder, _, data, _ = case
    again = collect(model, {"mine": coder}, explored.text(), rows_per_pass=rows_per_pass, **OPTIONS)["mine"]
    for name in ("counts", "histogram", "bin_widths"):
        assert torch.equal(getattr(again, name), getattr(data, name))
    for part in ("top", "sampled"):
        mine, theirs = getattr(again, part), getattr(data, part)
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.positions, theirs.positions)
        assert torch.equal(mine.tokens, theirs.tokens)
        torch.testing.assert_close(mine.activations, theirs.activations)


def test_several_dictionaries_on_one_pass_equal_each_alone():
    model, coders, tokens = explored.model(), {"a": explored.sae(), "b": explored.mambacoder()}, explored.text()
    both = explore(model, coders, tokens, **OPTIONS)
    assert list(both) == ["a", "b"]
    assert int(both["b"].counts.sum()) > 0
    for name, coder in coders.items():
        alone = collect(model, {name: coder}, tokens, **OPTIONS)[name]
        assert torch.equal(alone.counts, both[name].counts)
        assert torch.equal(alone.top.tokens, both[name].top.tokens)


def test_padding_and_excluded_tokens_do_not_count():
    model, coder = explored.model(), explored.sae(F=12, k=12)
    documents = [[1, 5, 9], [2, 3, 4, 6, 7, 8], [10, 5]]
    data = collect(model, {"mine": coder}, documents, pack=False, exclude_tokens=[5], **OPTIONS)["mine"]
    assert data.n_tokens == 9
    expected = torch.zeros(12, dtype=torch.long)
    for document in documents:
        z = dense(model, coder, torch.tensor([document]))[0]
        expected += (z[torch.tensor(document) != 5] > 0).sum(0)
    assert data.counts.tolist() == expected.tolist()
    real = data.top.tokens[data.top.tokens >= 0]
    assert set(real.tolist()) <= set(range(1, 11))


def test_documents_in_one_row_are_read_as_if_alone():
    model, coder = explored.model(), explored.sae(F=12, k=12)
    documents = [[1, 5, 9], [2, 3, 4, 6, 7, 8, 1, 2], [10, 5]]
    apart = collect(model, {"mine": coder}, documents, boundaries=True, **OPTIONS)["mine"]
    run_on = collect(model, {"mine": coder}, documents, **OPTIONS)["mine"]
    alone = collect(model, {"mine": coder}, documents, pack=False, **OPTIONS)["mine"]
    assert apart.n_tokens == run_on.n_tokens == alone.n_tokens == 13
    torch.testing.assert_close(apart.means, alone.means)
    assert torch.equal(apart.counts, alone.counts)
    assert not torch.allclose(run_on.means, alone.means)


def test_reading_stops_after_so_many_tokens(case):
    model, coder, _, _, z = case
    data = collect(model, {"mine": coder}, explored.text(), n_tokens=30, **OPTIONS)["mine"]
    assert data.n_tokens == 30
    assert data.counts.tolist() == (z.flatten(0, 1)[:30] > 0).sum(0).tolist()


def test_some_features_are_rows_of_all(case):
    model, coder, _, data, _ = case
    some = collect(model, {"mine": coder}, explored.text(), features=[7, 2], **OPTIONS)["mine"]
    chosen = data.only([7, 2])
    for held in (some, chosen):
        assert held.features.tolist() == [7, 2]
        assert torch.equal(held.counts, data.counts[[7, 2]])
        assert torch.equal(held.top.tokens, data.top.tokens[[7, 2]])
        assert torch.equal(held.neighbours.indices, data.neighbours.indices[[7, 2]])
        assert torch.equal(held.promoted.indices, data.promoted.indices[[7, 2]])
    with pytest.raises(IndexError, match="feature 3 of mine"):
        chosen.only([3])
    both = collect(model, {"a": coder, "b": coder}, explored.text(), features={"a": [7, 2], "b": [5]}, **OPTIONS)
    assert torch.equal(both["a"].counts, some.counts)
    assert both["b"].features.tolist() == [5]
    assert torch.equal(both["b"].top.tokens, data.top.tokens[[5]])


@pytest.mark.parametrize("family", MAMBA)
def test_promoted_tokens_are_those_whose_logits_the_decoder_raises(family):
    """Against the model itself: the direction added to its output, the final norm's divisor held."""
    model = build(family).double()
    coder = explored.sae(d=model.cfg.d_model).double()
    up, down = token_rankings(model, coder, 3)
    tokens = explored.text(1, 5)
    before, cache = model.run_with_cache(tokens)
    scale = cache["ln_final.hook_scale"]
    for f in (0, 17):
        hooks = [
            ("blocks.1.mixer.hook_out_proj", lambda out, hook, f=f: out + coder.W_dec[f].detach()),
            ("ln_final.hook_scale", lambda value, hook: scale),
        ]
        change = (model.run_with_hooks(tokens, fwd_hooks=hooks) - before)[0, -1] * scale[0, -1]
        change = (change - change.mean()).detach()
        assert up.indices[f].tolist() == change.topk(3).indices.tolist()
        torch.testing.assert_close(up.values[f].double(), change.topk(3).values, rtol=1e-4, atol=1e-5)
        assert down.indices[f].tolist() == change.topk(3, largest=False).indices.tolist()


def test_what_out_proj_reads_goes_through_it_and_other_sites_say_nothing():
    model = build("mamba")
    through = SparseCoder(sae_config("blocks.1.mixer.hook_y_gated", model.cfg.E, 8, k=2), seed=0)
    up, _ = token_rankings(model, through, 2)
    writes = through.W_dec.detach() @ model.blocks[1].mixer.out_proj.weight.t()
    logits = (writes * model.ln_final.weight) @ model.W_U
    assert up.indices.tolist() == logits.topk(2).indices.tolist()
    inside = SparseCoder(sae_config("blocks.1.mixer.hook_B", model.cfg.d_state, 8, k=2), seed=0)
    assert token_rankings(model, inside) is None
    data = collect(explored.model(), inside, explored.text(), **OPTIONS)
    assert next(iter(data.values())).promoted is None


def test_neighbours_by_cosine():
    W = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, -0.2]])
    found = neighbours(W, 2)
    assert found.indices.tolist() == [[1, 2], [0, 2], [1, 0], [2, 0]]
    torch.testing.assert_close(found.values[0, 0], torch.tensor(2 / (4 + 0.01) ** 0.5))
    assert neighbours(W, 9).indices.shape == (4, 3)
    assert neighbours(W, 1, torch.tensor([2])).indices.tolist() == [[1]]


def test_errors(unchecked):
    model, coder = explored.model(), explored.sae()
    with pytest.raises(OptionError, match="feature 40 does not exist: l1-out_proj has features 0 to 39"):
        collect(model, coder, explored.text(), features=[40], **OPTIONS)
    with pytest.raises(OptionError, match="features are of b, and the dictionaries are a"):
        collect(model, {"a": coder}, explored.text(), features={"b": [1]}, **OPTIONS)
    with pytest.raises(OptionError, match="label of feature 99"):
        collect(model, coder, explored.text(), labels={99: "x"}, **OPTIONS)
    with pytest.raises(OptionError, match="labels are given for 'b', and the dictionaries are a"):
        collect(model, {"a": coder}, explored.text(), labels={"b": {1: "x"}}, **OPTIONS)
    with pytest.raises(ValueError, match="holds 11 numbers"):
        collect(model, explored.sae(d=11), explored.text(), **OPTIONS)
    with pytest.raises(OptionError, match="every position of the text is excluded"):
        collect(model, coder, [[5, 5]], exclude_tokens=[5], **OPTIONS)
