"""The stranger's model: its mixer against loops, its text, and with the package installed its weights and page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from demos.stranger.directions import cut, flow
from demos.stranger.model import HookedStranger, StrangerConfig
from demos.stranger.text import LANGUAGES, Document, documents, languages_of, shuffled
from tests.hooked_mamba.tiny import randomize

ROOT = Path(__file__).parents[2]
SIZES = {"d_model": 5, "n_layers": 2, "d_vocab": 11, "d_inner": 6, "d_state": 3, "dt_rank": 2, "n_classes": 4}


def tiny():
    return randomize(HookedStranger(StrangerConfig(**SIZES, tie_embeddings=False)), seed=1).double().eval()


def tokens_for(length=7, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(length))


def by_loops(model, tokens):
    """The logits of one text, position by position from the equations."""
    x = model.embed.weight[tokens]
    for block in model.blocks:
        mixer, l = block.mixer, len(tokens)
        x_pre, z = mixer.in_proj(F.layer_norm(x, (5,), block.norm.weight, block.norm.bias, 1e-5)[None])[0].chunk(2, -1)
        u = []
        for t in range(l):
            taps = [mixer.conv1d.weight[:, 0, j] * x_pre[t + j - 1] for j in range(4) if 0 <= t + j - 1 < l]
            u.append(F.silu(sum(taps) + mixer.conv1d.bias))
        u = torch.stack(u)
        low, B, C = mixer.x_proj(u[None])[0].split([2, 3, 3], -1)
        dt = F.softplus(mixer.dt_proj(low[None])[0]) + 1e-4
        y = 2 * mixer.D * u
        for order in (range(l), reversed(range(l))):
            h = torch.zeros(6, 3, dtype=x.dtype)
            for t in order:
                h = torch.exp(-dt[t, :, None] * mixer.A_log.exp()) * h + (dt[t] * u[t])[:, None] * B[t]
                y = y + F.one_hot(torch.tensor(t), l)[:, None] * (h @ C[t])
        x = x + mixer.out_proj((y * F.silu(z))[None])[0]
    return model.unembed(F.layer_norm(x, (5,), model.ln_final.weight, model.ln_final.bias, 1e-5))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_forward_pass_is_the_equations(length):
    model, tokens = tiny(), tokens_for(length)
    expected = torch.stack([by_loops(model, row) for row in tokens])
    got = model(tokens)
    assert got.shape == (2, length, 4)
    torch.testing.assert_close(got, expected)
    names, weights = zip(*model.named_parameters(), strict=True)
    mine = torch.autograd.grad(got.square().sum(), weights, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected.square().sum(), weights, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(names, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing():
    model, tokens = tiny(), tokens_for(5, 1)
    for left, right in ((0, 3), (3, 0), (2, 1)):
        padded = F.pad(tokens, (left, right), value=9)
        mask = F.pad(torch.ones(1, 5, dtype=torch.long), (left, right))
        torch.testing.assert_close(model(padded, attention_mask=mask)[:, left : left + 5], model(tokens))


@torch.no_grad()
def test_hidden_attention_has_two_triangles():
    model, tokens = tiny(), tokens_for()
    _, cache = model.run_with_cache(tokens)
    view = cache.scan_view(1)
    rows, u = view.rows(), cache["x", 1]
    torch.testing.assert_close(torch.einsum("bets,bse->bte", rows, u), cache["y", 1])
    assert rows[:, :, 1, 5].abs().min() > 0
    assert rows[:, :, 5, 1].abs().min() > 0
    assert torch.equal(view.rows([4, -1]), rows[:, :, [4, -1]])
    # What the default of all held scans makes of the scan's own outputs, by their adjoint.
    torch.testing.assert_close(super(type(view), view).rows([2, 6]), rows[:, :, [2, 6]])
    ahead, back = view.ahead.rows(), view.back.rows().flip(2, 3)
    assert not ahead.triu(1).any()
    assert not back.tril(-1).any()
    parts, labels = cache.stack_source_results(1, "scan", return_labels=True)
    assert labels[-1] == "bias"
    torch.testing.assert_close(parts.sum(0), cache["out_proj", 1])
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["resid_post", 1])
    torch.testing.assert_close(
        flow(cache, 1).double(),
        (rows * u.transpose(1, 2)[:, :, None]).abs().mean(1),
        check_dtype=False,
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_a_cut_scan_passes_on_nothing_of_others():
    model, tokens = tiny(), tokens_for()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 11
    site = "blocks.1.mixer.hook_y_back"
    with cut(model, [1], ("back",)):
        _, cache = model.run_with_cache(tokens)
    view = cache.scan_view(1)
    expected = view.ahead.diagonal() * cache["x", 1]
    torch.testing.assert_close(cache[site], expected)
    _, whole = model.run_with_cache(tokens)
    torch.testing.assert_close(cache["y_ahead", 1], whole["y_ahead", 1])
    with cut(model, [0, 1], ("ahead", "back")):  # convolutions reach 2 positions back each layer, from position t + 2
        assert torch.equal(model(tokens)[:, :2], model(other)[:, :2])


def test_mixer_and_loader_are_short():
    assert len((ROOT / "demos" / "stranger" / "model.py").read_text(encoding="utf-8").splitlines()) < 150


def test_quotes_and_languages_of_text():
    one = Document("a = 'b c'\n\"d'e\" f", (0,) * 17)
    marked = "".join(c for c, inside in zip(one.text, one.quoted, strict=True) if inside)
    assert marked == "b cd'e"
    some = documents(6, 300, seed=3)
    assert some == documents(6, 300, seed=3)
    assert {len(one.text) for one in some} == {300}
    assert set(languages_of(some).flatten().tolist()) == {0, 1, 2}
    assert set(documents(1, 90, 3, language=2)[0].language) == {2}
    mixed = shuffled(some[0], 0)
    for i in range(len(LANGUAGES)):
        mine, theirs = (
            sorted(c for c, which in zip(one.text, one.language, strict=True) if which == i) for one in (some[0], mixed)
        )
        assert mine == theirs
    assert mixed.text != some[0].text


# With the package -----------------------------------------------------------------------------------------------

trained = pytest.mark.skipif(
    importlib.util.find_spec("typeseg") is None,
    reason="the package typeseg is not installed: `make test-all` installs it, or pip install 'typeseg==0.2.7'",
)


@pytest.mark.slow
@trained
@torch.no_grad()
def test_logits_are_the_packages_own():
    from demos.stranger.model import load, tokens_of
    from demos.stranger.task import package_logits

    model, labels = load()
    assert len(labels) == model.cfg.n_classes == 35
    for text in ("", "x", "SELECT a\n", "naïve – “text” \t\x00", *(one.text for one in documents(3, 300, seed=5))):
        if text:
            expected = torch.from_numpy(package_logits(text))
            assert (model(tokens_of(text))[0] - expected).abs().max() < 1e-4, text


@pytest.mark.slow
@trained
@torch.no_grad()
def test_it_tells_the_languages_apart():
    from demos.stranger.model import load
    from demos.stranger.task import hits

    model, labels = load()
    some = documents(12, 256, seed=7)
    right, wanted = hits(model, labels, some), languages_of(some)
    for i in range(3):
        assert right[wanted == i].float().mean() > 0.7
    control = hits(model, labels, [shuffled(one, 0) for one in some])
    assert control.float().mean() < right.float().mean() - 0.4


@pytest.mark.slow
@trained
def test_the_page_is_whole_and_asks_for_nothing(tmp_path, capsys):
    from demos.stranger.__main__ import main
    from tests.docs.test_site import requests_of

    few = {"train": 6, "test": 4, "length": 96, "lines": 1, "steps": 4}
    main(["--out", str(tmp_path), *(part for name, value in few.items() for part in (f"--{name}", str(value)))])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count("<section>") == 6
    assert not [one for one in requests_of(text) if not one.startswith("data:")]
    assert "nan" not in capsys.readouterr().out
