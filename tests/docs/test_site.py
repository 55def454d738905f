"""The site: every page is in it, every public name in its reference, and it asks for nothing from a network."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from docs.site.notebook_pages import shown
from docs.site.reference import PAGES, exports, page
from docs.site.repository import relink
from tests.docs.blocks import ROOT
from tests.docs.requests import Requests, requests_of

SITE = ROOT / "docs" / "site"


def entries(nav: list) -> list[str]:
    """All pages of a navigation, at any depth."""
    found = []
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        found += entries(value) if isinstance(value, list) else [value]
    return found


def test_every_document_is_in_the_navigation_once():
    nav = entries(yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), "readme.md"])


def packages() -> list[str]:
    """Every package of the distribution whose `__init__` exports something that it does not define."""
    found = []
    for path in sorted(
        path for top in ("hooked_mamba", "saes", "circuits") for path in (ROOT / top).rglob("__init__.py*")
    ):
        if path.suffix in (".py", ".pyi") and re.search(
            r" import (\w+) as \1$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found.append(".".join(path.parent.relative_to(ROOT).parts))
    return found


@pytest.mark.parametrize("package", packages())
def test_every_public_export_is_in_the_reference(package):
    everything = "\n".join(page(name) for name in PAGES)
    shown = set(re.findall(r"^::: (.+)$", everything, re.MULTILINE))
    for name, place in exports(package).items():
        assert place in shown or place.rpartition(".")[0] in shown, f"{package}.{name}"


@pytest.mark.parametrize("package", PAGES)
def test_places_of_the_reference_hold_what_the_package_exports(package):
    module = importlib.import_module(package)
    for name, place in exports(package).items():
        there, _, last = place.rpartition(".")
        held = getattr(module, name)
        assert held is (sys.modules[place] if isinstance(held, ModuleType) else getattr(sys.modules[there], last))


def test_links_hold_on_the_site():
    text = "[a](../README.md#install), [b](sites.md), ![c](images/tour.png), [d](https://x.org), `[e](../gone.md)`"
    assert relink(text, "index.md") == text.replace("../README.md#", "readme.md#")
    assert relink("[tests](docs/sites.md) of [it](LICENSE), [Makefile](Makefile)", "readme.md") == (
        "[tests](sites.md) of it (`LICENSE`), Makefile"
    )
    assert relink("[n](../demos/notebooks/a.ipynb)", "index.md") == "[n](notebooks/a.md)"
    assert relink("[b](b.ipynb), [r](../../README.md)", "notebooks/index.md") == "[b](b.md), [r](../readme.md)"
    assert relink("[s](../../docs/sites.md), [b](b.ipynb)", "notebooks/a.md") == "[s](../sites.md), [b](b.md)"
    assert (
        relink("````text\n```\n[x](../README.md)\n```\n````", "index.md")
        == "````text\n```\n[x](../README.md)\n```\n````"
    )


def test_equations_become_mathml():
    pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")
    from docs.site.mathml import with_mathml

    before = r'<p><span class="arithmatex">\(h_t &lt; 1\)</span></p><div class="arithmatex">\[\bar A\]</div>'
    made = with_mathml(before)
    assert re.findall(r'<math [^>]*display="(\w+)"', made) == ["inline", "block"]
    assert re.fullmatch(r"<p><math.*</math></p><math.*</math>", made)
    assert "&amp;" not in made  # the sign, not its name in HTML


def test_requests_are_seen():
    text = '<a href="https://x.org">x</a><link href="https://y.org/y.css"><script src="//z.org/z.js"></script>'
    text += '<use href="#i"/>'
    assert requests_of(text) == ["https://y.org/y.css", "//z.org/z.js", "#i"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a warning would be an error."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        "-f",
        str(SITE / "mkdocs.yml"),
        "-d",
        str(out),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return out


@pytest.mark.slow
def test_the_site_asks_for_nothing_from_a_network(site):
    elsewhere = re.compile(r"(?:\w+:)?//")
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 20
    assert styles
    for path in pages:
        wanted = requests_of(path.read_text(encoding="utf-8"))
        assert wanted, path.name
        assert not [one for one in wanted if elsewhere.match(one)], path.name
    for path in styles:
        text = path.read_text(encoding="utf-8")
        assert not [one for one in re.findall(r"url\(\s*[\"']?([^)\"']*)", text) if elsewhere.match(one)], path.name
        assert "@import" not in text


@pytest.mark.slow
def test_the_built_reference_has_every_name(site):
    for package in PAGES:
        text = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids)), package
        for name, place in exports(package).items():
            assert place in ids or f"#{place}" in text, f"{package}.{name}"


@pytest.mark.slow
def test_equations_on_the_built_site(site):
    text = (site / "concepts.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "arithmatex" not in text
    assert "<merror" not in text


def test_a_page_in_a_notebook_keeps_every_byte():
    inner = "<p>\n\n<script>\nlet x = 1\n\n\nlet y\n</script>"
    made = shown(
        {"output_type": "display_data", "data": {"text/html": [f'<iframe srcdoc="{html.escape(inner)}">\n\n</iframe>']}}
    )
    assert "\n\n" not in made
    frame = Requests()
    frame.feed(made)
    assert frame.frames == [inner]
