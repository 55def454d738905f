"""The page: what is in it, that hostile text stays text, and that it is written whole."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from saes.explorer import Explorer, explore, feature_explorer, render
from saes.explorer.page import CHUNK
from tests.saes.explorer import explored

HOSTILE = '</script><img src=x onerror="document.title=1">'


class Page(HTMLParser):
    """Its elements and the contents of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.addresses, self.open, self.policy = [], [], [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]
        if tag == "script":
            self.open = dict(attrs)
            self.scripts.append([self.open, ""])

    def handle_endtag(self, tag):
        if tag == "script":
            self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.scripts[-1][1] += data

    def json(self, name):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == name))


@pytest.fixture(scope="module")
def explorer():
    coders = {"a": explored.sae(), HOSTILE: explored.mambacoder()}
    labels = {"a": {3: HOSTILE}}
    return explore(explored.model(), coders, explored.text(), context_length=13, labels=labels, progress=False)


@pytest.fixture(scope="module")
def page(explorer):
    return Page(explorer.page(title=HOSTILE).html)


def test_the_overview_is_the_data(explorer, page):
    overview = page.json("overview")
    words, (first, second) = overview["words"], overview["dictionaries"]
    data = explorer["a"]
    assert (first["name"], second["name"], first["features"]) == ("a", HOSTILE, None)
    assert first["counts"] == data.counts.tolist()
    assert first["largest"] == pytest.approx(data.largest.tolist(), rel=1e-3)
    assert first["labels"] == {"3": HOSTILE}
    assert [words[w] for w in first["promoted"][5]] == [data.vocabulary[t] for t in data.promoted.indices[5].tolist()]
    peaks = {
        data.vocabulary[t] for t, v in zip(data.top.tokens[5, :, 24].tolist(), data.top.values[5], strict=True) if v
    }
    assert {words[w] for w in first["peaks"][5]} == peaks


def test_the_chunks_are_the_data(explorer, page):
    words = page.json("overview")["words"]
    for d, data in enumerate(explorer.values()):
        for f in (0, CHUNK - 9, len(data.features) - 1):
            shown = page.json(f"d{d}-{f // CHUNK}")[f % CHUNK]
            assert sum(shown["bins"]) == int(data.counts[f])
            assert [i for i, _ in shown["near"]] == data.neighbours.indices[f].tolist()
            assert [words[w] for w, _ in shown["up"]] == [data.vocabulary[t] for t in data.promoted.indices[f].tolist()]
            assert [value for _, value in shown["down"]] == pytest.approx(data.suppressed.values[f].tolist(), rel=1e-3)
            assert sum(times for *_, times in shown["top"]) == int((data.top.values[f] > 0).sum())
            for value, place, position, heat, _ in shown["top"]:
                row, first, said = page.json(f"t{d}-{place // CHUNK}")[place % CHUNK]
                slot = data.top.rows[f].tolist().index(row)
                assert value == pytest.approx(float(data.top.values[f, slot]), rel=1e-3)
                assert position == int(data.top.positions[f, slot])
                tokens = data.top.tokens[f, slot].tolist()
                piece = {position - 24 + i: data.vocabulary[t] for i, t in enumerate(tokens) if t >= 0}
                there = {t: words[w] for t, w in enumerate(said, first) if position - 24 <= t <= position + 7}
                assert there == piece
                active = {position - 24 + i: a for i, a in enumerate(data.top.activations[f, slot].tolist()) if a > 0}
                assert {position + d: a for d, a in zip(heat[::2], heat[1::2], strict=True)} == pytest.approx(
                    active, rel=1e-3
                )
                assert heat[heat[::2].index(0) * 2 + 1] == value
            assert len(shown["top"]) or not data.counts[f]


def test_hostile_text_makes_no_elements(explorer, page):
    """The only elements are the template's own. 40 and 24 features are three chunks, nine rows of text one for each."""
    assert page.tags.count("script") == 1 + 3 + 2 + 1
    assert "img" not in page.tags
    html = explorer.page(title=HOSTILE).html
    for nasty in (*explored.NASTY[:2], HOSTILE, "onerror=alert(1)>"):
        assert nasty not in html
    assert html.isascii() or all(ord(c) < 0x2028 or ord(c) > 0x2029 for c in html)
    words = page.json("overview")["words"]
    assert set(explored.NASTY) <= set(words)  # and yet they are there, as they were


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched(page):
    attrs, script = page.scripts[-1]
    assert attrs == {}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'")
    assert page.addresses == ["data:,"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttp|import\(", script)


def test_equal_pieces_of_text_are_shown_once():
    tokens = explored.text(1, 13).repeat(6, 1)
    page = explore(explored.model(), {"a": explored.sae()}, tokens, context_length=13, progress=False).page()
    shown = [f for chunk in (0, 1) for f in Page(page.html).json(f"d0-{chunk}")]
    assert {tuple(times for *_, times in f["top"]) for f in shown if f["top"]} == {(6,)}


def test_some_features_and_one(explorer):
    one = Explorer({"a": explorer["a"]})
    few = Page(one.page([7, 2]).html)
    assert few.json("overview")["dictionaries"][0]["features"] == [7, 2]
    assert len(few.json("d0-0")) == 2
    assert 'class="single"' in one.page([7]).html
    assert "Feature 7 of a" in one.page([7]).html
    with pytest.raises(KeyError, match="no dictionary is called 'c'; there are a"):
        one["c"]
    with pytest.raises(ValueError, match="no dictionary"):
        render([])


def test_features_that_are_never_active_have_a_page():
    model, coder = explored.model(), explored.sae()
    with torch.no_grad():
        coder.b_enc[3] = -1e3
    found = explore(model, {"mine": coder}, explored.text(), features=[3], context_length=13, progress=False)
    assert int(found["mine"].counts.sum()) == 0
    assert found.page().html.count("<script") > 1


def test_saving_replaces_the_file_as_a_whole(explorer, tmp_path, monkeypatch):
    path = explorer.save(tmp_path / "new" / "page.html", features=None)
    before = path.read_text()
    assert before.startswith("<!doctype html>")

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        Explorer({"a": explorer["a"]}).save(path)
    assert path.read_text() == before


def test_notebooks_get_a_frame_in_which_the_page_is_escaped(explorer):
    shown = explorer._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert shown.count("<") == 2


def test_feature_explorer_of_texts(tmp_path):
    """As in recurrentlens: one row of activations a text."""
    coder = explored.sae()
    activations = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    contexts = [f"context {i}" for i in range(29)] + [HOSTILE]
    page = feature_explorer(coder, 2, activations, contexts, top_k=5)
    page.save(tmp_path / "f.html")
    assert (tmp_path / "f.html").read_text() == page.html
    overview, (shown,) = Page(page.html).json("overview"), Page(page.html).json("d0-0")
    z = coder.encode(activations)[:, 2].detach()
    assert overview["dictionaries"][0]["counts"] == [int((z > 0).sum())]
    best = z.topk(5)
    n = int((best.values > 0).sum())
    assert n > 0
    rows = [row for i in range(1 + n // CHUNK) for row in Page(page.html).json(f"t0-{i}")]
    said = [overview["words"][rows[context[1]][2][0]] for context in shown["top"]]
    assert said == [contexts[i] for i in best.indices[:n].tolist()]
    assert [context[0] for context in shown["top"]] == pytest.approx(best.values[:n].tolist(), rel=1e-3)


def test_feature_explorer_of_tokens():
    model, coder = explored.model(), explored.sae(F=8, k=8)
    activations = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    contexts = [["a", " b", " c", " d"], ["e", "</script>"], [" b", " b", " b"]]
    page = Page(feature_explorer(coder, 1, activations, contexts, model=model, label="mine").html)
    overview, (shown,) = page.json("overview"), page.json("d0-0")
    z = coder.encode(activations)[..., 1].detach()
    lengths = [4, 2, 3]
    assert overview["dictionaries"][0]["tokens"] == 9
    assert overview["dictionaries"][0]["counts"] == [sum(int((z[i, :n] > 0).sum()) for i, n in enumerate(lengths))]
    for value, place, position, _, _ in shown["top"]:
        row, first, said = page.json("t0-0")[place]
        assert first == 0
        assert [overview["words"][w] for w in said] == contexts[row]
        assert value == pytest.approx(float(z[row, : lengths[row]].max()), rel=1e-3)
        assert position == int(z[row, : lengths[row]].argmax())
    assert len(shown["up"]) == 10
    assert overview["dictionaries"][0]["labels"] == {"1": "mine"}


def test_feature_explorer_errors(unchecked):
    coder = explored.sae()
    with pytest.raises(IndexError, match="features 0 to 39"):
        feature_explorer(coder, 40, torch.zeros(1, 10), ["a"])
    with pytest.raises(ValueError, match=r"2 contexts need activations \[2, d_in\]"):
        feature_explorer(coder, 0, torch.zeros(3, 10), ["a", "b"])
    with pytest.raises(ValueError, match="has 5 tokens, and there are activations of 2"):
        feature_explorer(coder, 0, torch.zeros(1, 2, 10), [list("abcde")])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(explorer, tmp_path):
    """The script runs to its end, shows the feature of the address and the hostile texts as texts."""
    path = explorer.save(tmp_path / "page.html", title="Features")
    f = int(explorer["a"].counts.argmax())
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [
        "chromium",
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"{path.as_uri()}#a/{f}",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"<h2>Feature {f}</h2>" in dom
    assert 'aria-selected="true"' in dom
    assert "&lt;/script&gt;&lt;img src=x onerror=" in dom
    assert "<img" not in dom
    assert len(re.findall(r'class="context"', dom)) > 3
