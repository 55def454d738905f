"""Coders that read a window of positions, against loops, and against the convolution whose inputs they read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from demos.dictionaries.presets import specs
from hooked_mamba.documents import Documents
from hooked_mamba.state import Padding
from saes import CoderConfig, SparseCoder, encode_on, evaluate, misses, splice, steer
from saes.diff import compare
from saes.explorer.collect import collect
from saes.files import CoderFileError, load
from saes.files.saelens import architecture_name, saelens_reads
from saes.naming import check_fits, default_name
from saes.options import OptionError
from saes.registry import Entry
from saes.run_options import run_options
from saes.store import Capture, DataConfig, ListedDocuments, Rows, make_store
from saes.store.rows import DocumentRows, take
from saes.targets import input_of, stream_values, streams_of, taps_of
from saes.training import FinetuneConfig, TrainConfig, coder_config, finetune_coders, train_coders
from saes.training.spliced_pass import spliced_pass
from saes.windows import Beginnings, windows
from tests.hooked_mamba.tiny import build, tokens_for
from tests.saes.models import noisy, tiny
from tests.saes.training import small

N, X = "blocks.1.norm.hook_out", "blocks.1.mixer.hook_x"
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def window_on(model: Any, layer: int = 1, window: int = 4, skip: bool = False) -> SparseCoder:
    """An untrained transcoder to x."""
    site = f"blocks.{layer}.mixer.hook_x"
    cfg = CoderConfig(
        architecture="topk", in_site=f"blocks.{layer}.norm.hook_out", out_site=site, d_in=window * model.cfg.d_model,
        d_out=model.site(site).width, d_sae=24, k=3, target="block", reads="normalized", window=window, skip=skip,
    )  # fmt: skip
    return noisy(SparseCoder(cfg, seed=layer))


def by_hand(x: Tensor, window: int, starts: set[int], history: Tensor | None = None) -> Tensor:
    """The windows of one row, l d: a text begins at each of `starts`, the first of them continuing a history."""
    first, rows = min(starts), []
    for t in range(len(x)):
        begin, read = max((s for s in starts if s <= t), default=t), []  # before the first: padding
        for s in range(t - window + 1, t + 1):
            before = history is not None and begin == first and s < first
            read.append(x[s] if s >= begin else history[s - first] if before else 0 * x[t])
        rows.append(torch.cat(read))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("continues", [False, True])
def test_windows_are_those_of_a_loop(window, padded, packed, continues):
    generator = torch.Generator().manual_seed(window)
    x = torch.randn(3, 7, 2, generator=generator)
    mask, ids = (
        torch.ones(3, 7, dtype=torch.long),
        torch.tensor([[0] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 1, 2, 2, 2, 3, 3]]),
    )
    if padded:
        mask[0, :3] = 0
        mask[1, 5:] = 0
    padding = Padding.from_mask(mask, (3, 7))
    documents = Documents.from_ids(ids, (3, 7), mask.bool(), torch.device("cpu")) if packed else None
    history = torch.randn(3, window - 1, 2, generator=generator) if continues else None
    found, last = windows(x, window, Beginnings(padding, documents), history)
    again = torch.randn(3, 2, 2, generator=generator)
    after, _ = windows(again, window, history=last)
    for row in range(3):
        real = mask[row].nonzero().flatten().tolist()
        starts = {real[0]} | ({t for t in real[1:] if ids[row, t] != ids[row, t - 1]} if packed else set())
        past = history[row] if continues else None
        assert torch.equal(found[row, real], by_hand(x[row], window, starts, past)[real])
        whole = torch.cat([x[row, : real[-1] + 1], again[row]])  # a call that goes on from here
        assert torch.equal(after[row], by_hand(whole, window, starts, past)[-2:])


def test_a_window_is_what_the_convolution_sees():
    """The convolution, computed from windows of packed and of padded rows, is the model's own at every position."""
    model = tiny("mamba")
    mixer, d = model.blocks[1].mixer, model.cfg.d_model
    documents = ListedDocuments([tokens_for(model, 1, n, seed=n)[0].tolist() for n in (3, 9, 2, 5, 1, 6)])
    packed = take(DocumentRows(documents, 8, boundaries=True, epochs=1), 3)
    padded = take(DocumentRows(documents, 8, pack=False, epochs=1), 6)
    left = Rows(padded.tokens.flip(1), padded.real.flip(1))
    for rows in (packed, padded, left):
        capture = Capture(model, [f"{N}@window4", "blocks.1.mixer.hook_conv"], dtype=torch.float64)
        assert capture.widths == {f"{N}@window4": 4 * d, "blocks.1.mixer.hook_conv": model.cfg.E}
        values = capture(rows)
        W = mixer.in_proj.weight[: model.cfg.E]
        parts = values[f"{N}@window4"].unflatten(-1, (4, d))
        conv = torch.einsum("nkd,ed,ek->ne", parts, W, mixer.conv1d.weight[:, 0]) + mixer.conv1d.bias
        torch.testing.assert_close(conv, values["blocks.1.mixer.hook_conv"], **EXACT)


def test_some_positions_have_the_windows_that_all_have():
    model, tokens = tiny(), tokens_for(tiny(), 3, 9)
    rows = Rows(tokens, torch.ones_like(tokens, dtype=torch.bool))
    whole = Capture(model, [f"{N}@window3", X], dtype=torch.float64)(rows)
    some = Capture(model, [f"{N}@window3", X], positions_per_row=4, dtype=torch.float64)
    chosen, _ = some.positions(rows, torch.Generator().manual_seed(1))
    values = some(rows, torch.Generator().manual_seed(1))
    for name, value in values.items():
        assert torch.equal(value, whole[name].unflatten(0, (3, 9))[:, chosen].flatten(0, 1))
    with pytest.raises(ValueError, match="say where that is, beginnings="):
        stream_values(f"{N}@window3", model.run_with_cache(tokens)[1], model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"window": True}, "window must be a positive integer, got True"),
        ({"window": 5}, "d_in must be a multiple of window=5, got 48"),
        ({"target": "local"}, "target 'local' is what position t's own input gives"),
        ({"in_site": X, "d_out": 48, "target": None, "reads": None}, "an SAE predicts what it reads at one position"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    fields = {
        "architecture": "topk", "in_site": N, "out_site": X, "d_in": 48, "d_out": 20, "d_sae": 8, "k": 2,
        "target": "block", "reads": "normalized", "window": 4,
    }  # fmt: skip
    assert CoderConfig.from_dict(CoderConfig(**fields).to_dict()) == CoderConfig(**fields)
    with pytest.raises(ValueError, match=message):
        CoderConfig(**{**fields, **changes})


def test_files_and_names(tmp_path):
    model = tiny()
    coder = window_on(model, skip=True)
    assert default_name(coder.cfg) == "l1-x-window4"
    assert streams_of(coder.cfg) == (f"{N}@window4", X)
    assert f"4 x {N} -> {X}" in repr(coder)
    coder.save(tmp_path / "w", metrics={"ev": 0.5})
    again = load(tmp_path / "w", SparseCoder)
    assert again.cfg == coder.cfg
    x = torch.randn(5, coder.cfg.d_in, dtype=torch.float64)
    torch.testing.assert_close(again(x), coder(x))
    assert Entry.of("w", coder.cfg).window == 4
    assert architecture_name(coder.cfg) == "topk_window_skip_transcoder"
    assert not saelens_reads(coder.cfg.replace(architecture="standard", k=None, skip=False))
    one = coder.cfg.replace(window=1, d_in=10)
    assert "window" not in one.to_dict()  # a file as it was before there were windows
    config = tmp_path / "w" / "cfg.json"
    config.write_text(config.read_text().replace('"window": 4', '"window": 7'))
    with pytest.raises(CoderFileError, match="d_in must be a multiple of window=7"):
        load(tmp_path / "w", SparseCoder)
    with pytest.raises(ValueError, match=r"holds 40 numbers per position, and .*@window8 of this model holds 80"):
        check_fits(SparseCoder(coder.cfg.replace(window=8), seed=0).double(), model, "it")


def test_short_forms():
    model = build("gated_deltanet")
    cfg = coder_config(model, {"site": "blocks.1.mixer.hook_v", "window": "taps", "d_sae": 8, "k": 2})
    assert (cfg.in_site, cfg.window, cfg.d_in) == ("blocks.1.norm.hook_out", 4, 4 * 6)
    attention = coder_config(model, {"site": "blocks.1.attn.hook_v", "window": "taps", "d_sae": 8, "k": 2})
    assert (attention.in_site, attention.window, attention.kind) == ("blocks.1.norm.hook_out", 1, "mambacoder")
    block = coder_config(model, {"layer": 0, "window": 3, "d_sae": 8, "k": 2})
    assert (block.out_site, block.window, block.d_in) == ("blocks.0.mixer.hook_out_proj", 3, 18)
    neurons = coder_config(model, {"site": "blocks.0.mlp.hook_post", "window": 2, "d_sae": 8, "k": 2})
    assert neurons.in_site == "blocks.0.norm2.hook_out"
    assert taps_of(build("rwkv7"), "blocks.0.mixer.hook_v") == 2
    assert input_of(model, "blocks.1.moe.hook_out") == "blocks.1.norm2.hook_out"
    with pytest.raises(OptionError, match="window must be a whole number at least 1, got 'four'"):
        coder_config(model, {"layer": 1, "site": "v", "window": "four", "d_sae": 8})
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post is no site of a branch"):
        coder_config(model, {"site": "blocks.1.hook_resid_post", "window": 2, "d_sae": 8})


@pytest.mark.parametrize("family", ["mamba", "mamba2-groups"])
def test_spliced_coders_read_the_pass_under_way(family):
    """By hooks that do the same in a loop, padded and packed rows too; errors kept, and of another pass."""
    model, coder = tiny(family), window_on(tiny(family), skip=True)
    tokens = tokens_for(model, 3, 7)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 1, 1, 1, 2, 2]])
    for told in ({}, {"attention_mask": mask}, {"document_ids": ids}):
        real = told.get("attention_mask", torch.ones_like(mask)).bool()
        _, cache = model.run_with_cache(tokens, names_filter=[N, X], **told)
        new = cache[X].clone().flatten(2)
        for row in range(3):
            at = real[row].nonzero().flatten().tolist()
            starts = {at[0]} | {t for t in at[1:] if "document_ids" in told and ids[row, t] != ids[row, t - 1]}
            new[row, at] = coder(by_hand(cache[N][row], 4, starts))[at]
        new = new.reshape(cache[X].shape)
        expected = model.run_with_hooks(tokens, fwd_hooks=[(X, lambda value, hook: new)], **told)  # noqa: B023
        with splice(model, coder):
            torch.testing.assert_close(model(tokens, **told)[real], expected[real], **EXACT)
        with splice(model, coder, error=misses(model, coder, tokens, **told)):
            torch.testing.assert_close(model(tokens, **told)[real], model(tokens, **told)[real], **EXACT)


@pytest.mark.parametrize("family", ["mamba", "rwkv7"])
def test_generating_is_running_the_whole_text(family):
    model = tiny(family)
    site = "blocks.{}.mixer." + ("hook_x" if family == "mamba" else "hook_v")
    coders = []
    for layer in range(2):
        spec = {"site": site.format(layer), "window": 3, "d_sae": 24, "k": 3, "skip": True, "input_norm": "none"}
        coders.append(noisy(SparseCoder(coder_config(model, spec), seed=layer)))
    tokens = tokens_for(model, 2, 6)
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    logits = []

    def keep(value: Tensor, hook: Any) -> None:
        logits.append(value)

    with splice(model, coders), model.hooks([("hook_logits", keep)]):
        made = model.generate(tokens, 5, **options)
    with splice(model, coders):
        whole = model(made)
    torch.testing.assert_close(torch.cat(logits, 1), whole[:, :-1], **EXACT)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with splice(model, coders):
        padded = model.generate(tokens, 5, attention_mask=mask, **options)
        alone = model.generate(tokens[:1, 2:], 5, **options)
    assert torch.equal(padded[0, 6:], alone[0, 4:])
    with steer(model, coders[1], 3, 2.0), splice(model, coders[0]):
        steered = model.generate(tokens, 5, **options)
        assert torch.equal(model(steered)[:, 5:-1].argmax(-1), steered[:, 6:])


def test_what_no_memory_holds_is_refused():
    model, coder = tiny(), window_on(tiny())
    tokens = tokens_for(model)
    _, state = model(tokens, return_state=True)
    refused = r"a window of 4 positions cannot continue from an initial state or in a beam search"
    with splice(model, coder):
        expected = model(tokens)
        torch.testing.assert_close(model(tokens, initial_state=model.initial_state(2)), expected)  # an empty one
        with pytest.raises(ValueError, match=refused):
            model(tokens, initial_state=state)
        with pytest.raises(ValueError, match=refused):
            model.generate(tokens, 2, initial_state=state, verbose=False)
        with pytest.raises(ValueError, match=refused):
            model.generate(tokens, 3, num_beams=2, do_sample=False, verbose=False)
        torch.testing.assert_close(model(tokens), expected)
    model.generate(tokens, 3, num_beams=2, do_sample=False, verbose=False)
    assert not model.rows_move


@torch.no_grad()
def test_readings_comparisons_and_figures():
    model, coder = tiny(), window_on(tiny())
    tokens, mask = tokens_for(model, 2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = encode_on(model, coder, tokens, attention_mask=mask)
    alone = encode_on(model, coder, tokens[:1, 2:])
    torch.testing.assert_close(found.dense()[0, 2:], alone.dense()[0], **EXACT)
    assert compare(model, model, coder, tokens, mask=mask).correlation.max() > 0.999
    documents = [row.tolist() for row in tokens_for(model, 6, 8)]
    data = collect(model, coder, documents, context_length=8, progress=False, top=3)["l1-x-window4"]
    _, cache = model.run_with_cache(torch.tensor(documents), names_filter=[N])
    z = torch.stack([coder.encode(by_hand(n, 4, {0})) for n in cache[N]])
    assert data.counts.tolist() == (z != 0).sum((0, 1)).tolist()
    rows = Rows(tokens, mask.bool())
    report = evaluate(model, coder, rows, ["ev", "kl", "l0"], progress=False)
    _, cache = model.run_with_cache(tokens, names_filter=[N, X], attention_mask=mask)
    y = torch.cat([cache[X][0, 2:], cache[X][1]]).flatten(1)
    y_hat = torch.cat([coder(by_hand(cache[N][0], 4, {2}))[2:], coder(by_hand(cache[N][1], 4, {0}))])
    ev = 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
    assert abs(report.rows[0].values["ev"] - float(ev)) < 1e-9
    assert report.rows[0].values["kl"] > 0


DATA = {"batch_size": 64, "context_length": 16, "block_tokens": 256, "boundaries": True, "dtype": "float32"}


def test_training_reads_windows_and_continues(tmp_path):
    """From memory and from disk, beside another coder; the loss falls, and a stopped training continues as it was."""
    model = small.model()
    named = {
        "window": coder_config(model, {"layer": 1, "site": "x", "window": "taps", "d_sae": 32, "k": 4}),
        "block": coder_config(model, {"layer": 0, "window": 2, "d_sae": 32, "k": 4, "skip": True}),
    }
    text = small.documents()
    settings = {"lr": 3e-3, "progress": False, "checkpoint_every": 10}

    def train(steps: int, out: Path | None = None, resume: bool = False, **data: Any):
        config = TrainConfig(steps=steps, **settings)
        return train_coders(model, named, text_rows(), config, DataConfig(**DATA, **data), out=out, resume=resume)

    def text_rows() -> DocumentRows:
        return DocumentRows(text, 16, boundaries=True)

    short, longer = train(2), train(40, tmp_path / "run")
    assert longer.measured["window"]["ev"] > short.measured["window"]["ev"] + 0.05
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000040")
    again = train(40, tmp_path / "run", resume=True)
    assert again.step == 40
    assert torch.equal(again.coders["window"].W_enc, longer.coders["window"].W_enc)
    loaded = SparseCoder.load(tmp_path / "run" / "coders" / "window")
    assert loaded.cfg.window == 4
    assert loaded.cfg.d_in == 4 * small.D
    store = make_store(model, [f"{N}@window4", X], text_rows(), DataConfig(**DATA))
    values = next(store)
    assert values[f"{N}@window4"].shape == (64, 4 * small.D)
    assert train(5, folder=str(tmp_path / "acts"), disk_tokens=512).complete


def test_flags_describe_windows():
    flags = {"text": "t", "out": "o", "layer": [0, 2], "site": "x", "window": 4, "d_sae": 8, "train.steps": 1}
    assert run_options(None, flags)["coders"] == [
        {"site": "x", "window": 4, "d_sae": 8, "layer": 0},
        {"site": "x", "window": 4, "d_sae": 8, "layer": 2},
    ]
    assert specs("any", [1], "x", 8, window="taps") == (
        {"name": "l1-write-window", "layer": 1, "site": "x", "d_sae": 8, "window": "taps"},
    )


def test_fine_tuning_through_the_model():
    model = small.model()
    cfg = coder_config(model, {"layer": 1, "site": "x", "window": 4, "d_sae": 32, "k": 4, "input_norm": "none"})
    coder = SparseCoder(cfg, seed=0)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    tokens = tokens_for(model, 2, 12)
    rows = Rows(tokens, torch.ones_like(tokens, dtype=torch.bool), ids)
    found = spliced_pass(model, {"w": coder}, rows)
    found.kl.backward()
    got = coder.W_enc.grad.clone()
    coder.zero_grad()

    def by_loop(value: Tensor, hook: Any) -> Tensor:
        x = [by_hand(n, 4, {0, 5} if row == 0 else {0}) for row, n in enumerate(kept["n"])]
        pre = torch.stack(x) @ coder.W_enc + coder.b_enc
        floor = pre.sort(-1).values[..., -4].unsqueeze(-1)
        return (torch.where(pre >= floor, pre.clamp(min=0), 0.0) @ coder.W_dec + coder.b_dec).reshape(value.shape)

    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept["n"] = value

    clean = model(tokens, document_ids=ids).log_softmax(-1).detach()
    with model.hooks([(N, keep), (X, by_loop)]):
        spliced = model(tokens, document_ids=ids).log_softmax(-1)
    kl = (clean.exp() * (clean - spliced)).sum(-1).mean()
    kl.backward()
    torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got, coder.W_enc.grad, rtol=1e-3, atol=1e-6)
    config = FinetuneConfig(steps=30, lr=3e-3, log_every=5, progress=False)
    data = DataConfig(rows_per_pass=4, context_length=12)
    result = finetune_coders(model, {"w": coder}, small.documents_text(), config, data)
    assert result.measured["w"]["kl"] < kl.item()
