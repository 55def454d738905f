"""The report, against the model run by hand with its sites overwritten."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hooked_mamba import HookedMamba
from saes import Report, SparseCoder, evaluate, evaluate_activations, mambacoder_config, sae_config
from saes.report import METRICS
from saes.store import DocumentRows, ListedDocuments, Rows
from saes.targets import local_part, sites_of
from tests.hooked_mamba.tiny import tokens_for
from tests.kinds import LINEAR
from tests.saes.models import mambacoder_on, sae_on, tiny

OUT = "blocks.0.mixer.hook_out_proj"
POST = "blocks.1.hook_resid_post"


def padded(model):
    tokens = tokens_for(model, 5, 9)
    mask = torch.ones_like(tokens)
    mask[1, :3], mask[3, 5:] = 0, 0
    return tokens, mask


def log_probs(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(model, tokens, mask, coders, constants=None, counted=None):
    """Cross-entropy and the log-probabilities of all pairs; an SAE overwrites its site, a coder of layer 0's local part
    that part, as the clean run has it."""
    counted = mask.bool() if counted is None else counted
    inputs = [*sites_of(f"{OUT}@local", model), "blocks.0.norm.hook_out"]
    _, cache = model.run_with_cache(tokens, names_filter=inputs, attention_mask=mask)
    local = local_part(model, 0, cache)

    def writing(coder):
        def write(value, hook):
            x = value if coder.cfg.is_sae else cache["blocks.0.norm.hook_out"]
            new = coder(x) if constants is None else constants[id(coder)].expand_as(value)
            new = new if coder.cfg.is_sae else value - local + new
            return torch.where(counted.unsqueeze(2), new, value)

        return coder.cfg.out_site, write

    hooks = [writing(coder) for coder in coders]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks).numpy()
    lp = log_probs(logits)
    pairs = [(b, t) for b in range(len(tokens)) for t in range(tokens.shape[1] - 1) if mask[b, t] and mask[b, t + 1]]
    ce = np.mean([-lp[b, t, tokens[b, t + 1]] for b, t in pairs])
    return ce, np.array([lp[b, t] for b, t in pairs])


@pytest.mark.parametrize("family", LINEAR)
def test_every_figure_by_hand(family):
    model = tiny(family)
    coders = {"sae": sae_on(model, POST), "local": mambacoder_on(model, 0, target="local")}
    tokens, mask = padded(model)
    report = evaluate(model, coders, tokens, attention_mask=mask, progress=False, batch_size=2)
    assert report.tokens == int(mask.sum()) == 45 - 3 - 4
    assert report.predictions == 40 - 3 - 4
    ce, clean = by_hand(model, tokens, mask, [])
    assert ce == pytest.approx(float(model(tokens, return_type="loss", attention_mask=mask).detach()), rel=1e-12)

    real = mask.bool()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
    y = {"sae": cache[POST][real], "local": local_part(model, 0, cache)[real].detach()}
    x = {"sae": y["sae"], "local": cache["blocks.0.norm.hook_out"][real]}
    means, zeros = {}, {}
    for name, coder in coders.items():
        got = report[name]
        a, b = y[name].detach().numpy(), coder(x[name]).detach().numpy()
        z = coder.encode(x[name]).detach().numpy()
        assert got["mse"] == pytest.approx(np.mean((a - b) ** 2), rel=1e-10)
        assert got["fvu"] == pytest.approx(np.sum((a - b) ** 2) / np.sum((a - a.mean(0)) ** 2), rel=1e-10)
        assert got["l0"] == pytest.approx((z != 0).sum(1).mean())
        assert got["dead_share"] == pytest.approx(1 - (z != 0).any(0).mean())
        assert sum(got.histogram) == (z != 0).any(0).sum()
        means[id(coder)] = y[name].detach().mean(0)
        zeros[id(coder)] = torch.zeros_like(means[id(coder)])
    for name, part in (
        {name: [coder] for name, coder in coders.items()} | {"all together": [*coders.values()]}
    ).items():
        got = report[name]
        spliced, q = by_hand(model, tokens, mask, part)
        zero, mean = (by_hand(model, tokens, mask, part, constants)[0] for constants in (zeros, means))
        assert got["ce_clean"] == pytest.approx(ce, rel=1e-10)
        assert got["ce_spliced"] == pytest.approx(spliced, rel=1e-10)
        assert got["ce_zero"] == pytest.approx(zero, rel=1e-10)
        assert got["ce_mean"] == pytest.approx(mean, rel=1e-10)
        assert got["ce_recovered_zero"] == pytest.approx((zero - spliced) / (zero - ce), rel=1e-8)
        assert got["ce_recovered_mean"] == pytest.approx((mean - spliced) / (mean - ce), rel=1e-8)
        assert got["kl"] == pytest.approx((np.exp(clean) * (clean - q)).sum(1).mean(), rel=1e-9)
        assert len({round(v, 6) for v in (ce, spliced, zero, mean)}) == 4


def close(a: Report, b: Report, tolerance=1e-12):
    assert [s.name for s in a.rows] == [s.name for s in b.rows]
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one.histogram == other.histogram
        assert dict(one.values) == pytest.approx(dict(other.values), rel=tolerance, abs=tolerance)


def test_batches_of_any_size_and_any_form_of_data_give_the_same():
    model = tiny()
    coders = [sae_on(model, OUT, architecture="jumprelu"), mambacoder_on(model, 1)]
    tokens, mask = padded(model)
    whole = evaluate(model, coders, tokens, attention_mask=mask, progress=False, batch_size=5)
    for size in (1, 2, 3, 100):
        close(whole, evaluate(model, coders, tokens, attention_mask=mask, progress=False, batch_size=size), 1e-9)
    rows = Rows(tokens, mask.bool())
    close(whole, evaluate(model, coders, rows, progress=False), 1e-9)
    close(whole, evaluate(model, coders, [Rows(tokens[:1], mask[:1].bool()), Rows(tokens[1:], mask[1:].bool())],
                          progress=False), 1e-9)  # fmt: skip
    packed = tokens_for(model, 4, 6)
    whole = evaluate(model, coders, packed, progress=False)
    source = DocumentRows(ListedDocuments(list(packed), shuffle=False), 6, epochs=1)
    close(whole, evaluate(model, coders, source, progress=False, batch_size=3), 1e-9)
    close(whole, evaluate(model, coders, packed.tolist(), progress=False), 1e-9)
    endless = DocumentRows(ListedDocuments(list(packed), shuffle=False), 6)
    close(whole, evaluate(model, coders, endless, progress=False, n_tokens=24, batch_size=2), 1e-9)
    with pytest.raises(ValueError, match="never ends"):
        evaluate(model, coders, endless, progress=False)


def test_a_perfect_coder_costs_nothing_and_zeros_are_zeros():
    model = tiny()
    d = model.cfg.d_model
    perfect = SparseCoder(sae_config(OUT, d, 2 * d, architecture="standard"), seed=0).double()
    nothing = SparseCoder(sae_config(OUT, d, 2 * d, architecture="standard"), seed=0).double()
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        perfect.W_enc.copy_(both.t())
        perfect.W_dec.copy_(both)
        nothing.b_enc.fill_(-1e9)
    report = evaluate(model, {"perfect": perfect, "nothing": nothing}, tokens_for(model), progress=False)
    assert report.together is None, "two coders on one site cannot both replace it"
    got = report["perfect"]
    assert got["fvu"] == pytest.approx(0, abs=1e-20)
    assert (got["cosine"], got["ce_recovered_zero"], got["ce_recovered_mean"]) == pytest.approx((1, 1, 1))
    assert got["kl"] == pytest.approx(0, abs=1e-12)
    assert got["l0"] == pytest.approx(d)
    got = report["nothing"]
    assert (got["l0"], got["dead_share"], got["ce_recovered_zero"]) == pytest.approx((0, 1, 0))
    assert got["ce_spliced"] == pytest.approx(got["ce_zero"])
    assert sum(got.histogram) == 0


def test_excluded_tokens_are_neither_counted_nor_replaced():
    model = tiny()
    sae = sae_on(model, POST)
    tokens, mask = padded(model)
    tokens[:, 4] = 16
    counted = mask.bool() & (tokens != 16)
    report = evaluate(model, sae, tokens, attention_mask=mask, exclude_tokens=[16], progress=False)
    assert report.tokens == int(counted.sum())
    assert report.predictions == 33
    _, cache = model.run_with_cache(tokens, names_filter=POST, attention_mask=mask)
    y = cache[POST][counted]
    assert report["l1-resid_post"]["mse"] == pytest.approx(float((y - sae(y)).detach().square().mean()))
    spliced, _ = by_hand(model, tokens, mask, [sae], counted=counted)
    everywhere, _ = by_hand(model, tokens, mask, [sae])
    assert report["l1-resid_post"]["ce_spliced"] == pytest.approx(spliced)
    assert abs(spliced - everywhere) > 1e-4


def test_only_what_is_asked_for_is_run_and_reported():
    model = tiny()
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    sae, tokens = sae_on(model, OUT), tokens_for(model)
    for metrics, passes in ((["mse", "l0"], 1), ("kl", 2), (["ce"], 2), (["ce_recovered"], 5), (None, 5)):
        calls.clear()
        report = evaluate(model, sae, tokens, metrics, progress=False)
        assert len(calls) == passes, metrics
        if metrics == ["mse", "l0"]:
            assert list(report["l0-out_proj"].values) == ["mse", "l0"]
            assert report["l0-out_proj"].histogram == ()
            assert report.predictions == 0
    handle.remove()
    assert set(report["l0-out_proj"].values) == set(METRICS) - {"density"}
    with pytest.raises(ValueError, match="no metric is called 'fvvu'; nearest: fvu"):
        evaluate(model, sae, tokens, ["fvvu"])
    with pytest.raises(KeyError, match="no figure 'mse'"):
        evaluate(model, sae, tokens, ["l0"], progress=False)["l0-out_proj"]["mse"]


def test_activations_at_hand():
    model = tiny()
    coders = [sae_on(model, OUT), mambacoder_on(model, 0)]
    tokens = tokens_for(model)
    _, cache = model.run_with_cache(tokens)
    names = ("blocks.0.norm.hook_out", OUT)
    flat = {name: cache[name].flatten(0, 1).detach() for name in names}
    batches = [{name: value[part] for name, value in flat.items()} for part in (slice(0, 5), slice(5, 14))]
    whole = evaluate(model, coders, tokens, ["reconstruction", "sparsity"], progress=False)
    report = evaluate_activations(coders, batches)
    close(whole, report)
    assert evaluate_activations(coders, batches, n_tokens=4).tokens == 5
    with pytest.raises(ValueError, match="kl need the model"):
        evaluate_activations(coders, batches, ["kl"])


def test_the_report_as_text_json_and_html(tmp_path):
    model = tiny()
    name = "<img src=x onerror=alert(1)> & [bold]"
    report = evaluate(
        model, {name: sae_on(model, OUT), "b": mambacoder_on(model, 1)}, tokens_for(model), progress=False
    )
    assert Report.load(report.save(tmp_path / "report.json")) == report
    values = json.loads(report.to_json())
    assert values["coders"][0]["values"]["mse"] == report[name]["mse"]
    assert values["together"]["name"] == "all together"
    text = str(report)
    assert "[bold]" in text
    assert f"{report['b']['fvu']:.4g}" in text
    assert f"{report['all together']['kl']:.4g}" in text
    html = report._repr_html_()
    assert "<img" not in html
    assert "&lt;img" in html
    assert "Latents by log10 density" in html
    with pytest.raises(KeyError, match="no coder is called 'c'"):
        report["c"]
    with pytest.raises(ValueError, match="a report has no option 'tokes'; nearest: tokens"):
        Report.from_dict({**values, "tokes": 3})


def test_numbers_that_overflow_are_errors():
    model = tiny()
    sae = sae_on(model, OUT)
    with torch.no_grad():
        sae.W_dec[:] = math.nan
    with pytest.raises(FloatingPointError):
        evaluate(model, sae, tokens_for(model), progress=False)


def test_texts_and_the_bundled_model():
    """The loss is the model's own; padding among texts of several lengths counts nowhere."""
    model = HookedMamba.from_pretrained("tinystories-4l")
    texts = ["Once upon a time, there was a small cat.", "Tom ran.", "The dog was sad because it was raining."]
    coders = [SparseCoder(mambacoder_config(layer, 192, 64, architecture="topk", k=4), seed=layer) for layer in (0, 3)]
    report = evaluate(model, coders, texts, ["ce", "l0"], progress=False, batch_size=2)
    lengths = [model.to_tokens(text).shape[1] for text in texts]
    assert report.tokens == sum(lengths)
    assert report.predictions == sum(lengths) - 3
    with torch.no_grad():
        alone = [float(model(text, return_type="loss")) * (n - 1) for text, n in zip(texts, lengths, strict=True)]
    assert report["all together"]["ce_clean"] == pytest.approx(sum(alone) / report.predictions, rel=1e-5)
    assert report.model == model.cfg.model_name
    with pytest.raises(ValueError, match="masked by themselves"):
        evaluate(model, coders, texts, attention_mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model, coders, [])


def test_documents_kept_apart_are_evaluated_apart():
    """One packed row gives what its documents give as rows of their own."""
    model = tiny()
    coders = [sae_on(model, OUT, architecture="jumprelu")]
    tokens = torch.arange(9)[None] % model.cfg.d_vocab
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    packed = Rows(tokens, torch.ones_like(tokens).bool(), ids)
    pieces = [tokens[:, a:b] for a, b in ((0, 4), (4, 7), (7, 9))]
    apart = [Rows(piece, torch.ones_like(piece).bool()) for piece in pieces]
    close(evaluate(model, coders, [packed], progress=False), evaluate(model, coders, apart, progress=False), 1e-9)
