"""Cards: what they say, and that no name in them is anything but text."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from saes.cards import MARK, escape, model_card
from saes.config import ARCHITECTURES
from saes.files.saelens import saelens_reads
from saes.registry import Entry
from tests.saes.coders import config


def entry(name: str = "one", architecture: str = "topk", kind: str = "sae", metrics=None, **fields) -> Entry:
    return Entry.of(name, config(architecture, kind, **fields), metrics)


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_what_it_says():
    entries = [
        entry("one", model_name="state-spaces/mamba-130m-hf", model_hash="0123abcd", metrics={"fvu": 0.12345, "l0": 4}),
        entry("two", "batchtopk", "skip", metrics={"ce recovered": 0.97, "fvu": None}),
    ]
    card = model_card(entries, repo="someone/coders", license="apache-2.0")
    assert header(card) == {
        "library_name": "saelens", "license": "apache-2.0", "base_model": ["state-spaces/mamba-130m-hf"],
        "tags": ["saelens", "sparse-autoencoder", "interpretability", "mamba"],
    }  # fmt: skip
    assert MARK in card
    plain = card.replace("\\", "")
    assert "2 sparse autoencoders and MambaCoders on state-spaces/mamba-130m-hf." in plain
    assert "| one | sae | topk | blocks.1.hook_resid_post | the same | 12 → 40 → 12 | 4 |" in plain
    assert "| two | mambacoder | batchtopk, skip | blocks.1.norm.hook_out | blocks.1.mixer.hook_out_proj |" in plain
    assert "| name | fvu | l0 | ce recovered |" in plain
    assert "| one | 0.1235 | 4 | – |" in plain
    assert "| two | – | – | 0.97 |" in plain
    assert 'from_pretrained("someone/coders", "one")' in card
    assert "0123abcd" in card


def test_one_coder_of_an_unnamed_model_without_metrics():
    card = model_card([entry()], repo="x")
    assert "1 sparse autoencoder on a model that is not named." in card
    assert "Metrics" not in card
    assert "base_model" not in header(card)
    with pytest.raises(ValueError, match="at least one coder"):
        model_card([], repo="x")


TRICKS = [
    "<script>alert(1)</script>", "a | b | c", "[x](javascript:alert(1))", "`code` **bold**", "line\nbreak\n# head",
    "![i](http://x/y.png)", "{{ 7 * 7 }}", "{% raw %}", "-->", "---", "\u202egnp.exe", "&lt;b&gt;", "$x$",
    "~~gone~~", "www.example.com http://example.com a@example.com", 'q"uote\\',
]  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_names_are_text(trick):
    made = entry(model_name=trick, model_hash=trick, metrics={trick: 0.5})
    card = model_card([made], repo=trick, title=trick, license=trick)
    plain = model_card([entry(model_name="m", model_hash="m", metrics={"m": 0.5})], repo="m", title="m", license="m")
    assert card.count("\n") == plain.count("\n"), "a name breaks no line"
    body = card.split(MARK)[1]
    text, code, rest = body.replace("```python", "```").split("```")
    assert "<" not in text + rest
    assert "](" not in (text + rest).replace("\\]", "")
    assert "49" not in body
    bars = [line.replace("\\|", "").count("|") for line in text.splitlines()]
    assert bars == [line.count("|") for line in plain.split(MARK)[1].split("```")[0].splitlines()]
    assert header(card)["license"] == trick
    compile(code, "card", "exec")


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_no_text_does_anything(text):
    line = escape(text)
    assert "\n" not in line
    assert "<" not in line
    assert ">" not in line
    bare = line.replace("\\\\", "")
    for mark in "`*_[]|#:@!$~":
        assert mark not in bare.replace(f"\\{mark}", "")


@pytest.mark.parametrize("kind", ["sae", "mambacoder", "skip"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_card_names_saelens_only_where_it_can_load_a_coder(architecture, kind):
    cfg = config(architecture, kind)
    card = model_card([Entry.of("a", cfg)], repo="owner/name")
    for says in ("library_name: saelens", '- "saelens"', "is a SAELens directory"):
        assert (says in card) == saelens_reads(cfg)
    assert ("loads here only: a." in card) != saelens_reads(cfg)
