"""What the documents say: their code runs and prints what they show, and their tables are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from demos.notebooks.rounded import alike
from hooked_mamba.hooks.names import declared, is_declared
from hooked_mamba.loading import bundled_names
from hooked_mamba.loading.registry import FORMATS
from hooked_mamba.site_tables import all_tables
from tests.docs.blocks import ROOT, blocks_of, documents, run_blocks

DOCUMENTS = {str(path.relative_to(ROOT)): path for path in documents()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_runs_and_prints_what_is_shown(name, tmp_path):
    path = DOCUMENTS[name]
    lines = path.read_text(encoding="utf-8").splitlines()
    for block, printed in zip(blocks_of(path), run_blocks(path, tmp_path), strict=True):
        if block.shown is not None:
            shown = lines[slice(*block.shown)]
            if not alike("\n".join(shown), printed.rstrip("\n")):  # equal only where nothing was rounded, see `alike`
                assert printed.splitlines() == shown, f"{name}, block of line {block.start}"


def test_a_block_that_prints_something_else_is_seen(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 1\nprint(x)\n```\n\nthen\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n")
    first, second = blocks_of(path)
    assert first.shown is None
    assert run_blocks(path, tmp_path) == ["1\n", "2\n"]
    assert path.read_text().splitlines()[slice(*second.shown)] == ["3"]


def test_the_tables_of_sites_are_those_of_the_code():
    text = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")
    for title, table in all_tables().items():
        assert f"### {title}\n\n{table}\n" in text


def test_the_page_on_mixers_adds_one_in_fewer_than_60_lines():
    page = ROOT / "docs" / "adding-a-mixer.md"
    block = blocks_of(page)[0]
    lines = [line for line in page.read_text(encoding="utf-8").splitlines()[block.start : block.end] if line.strip()]
    classes = [line.split("(")[0] for line in lines if line.startswith("class ")]
    assert classes == ["class ToyConfig", "class ToyState", "class ToyMixer", "class HookedToy"]
    assert len(lines) < 60
    nav = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    assert "- adding-a-mixer.md\n" in nav
    assert "(adding-a-mixer.md)" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def test_what_a_page_defines_is_forgotten(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nfrom hooked_mamba.hooks.names import is_declared\nfrom hooked_mamba.hooks.site import Site\n"
        "from hooked_mamba.mixers.base import Branch\n\n\nclass Mine(Branch):\n"
        "    kind, title, place = 'mine', 'Mine', 'mine'\n    sites = (Site('hook_mine', 'b l d', 'all'),)\n\n\n"
        "print(is_declared('blocks.0.mine.hook_mine'))\n```\n"
    )
    assert run_blocks(path, tmp_path) == ["True\n"]
    assert not is_declared("blocks.0.mine.hook_mine")
    assert "Mine" not in all_tables()


def test_every_alias_is_documented_beside_its_site():
    text = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`([^`]+)`", line) for line in text.splitlines() if line.startswith("| `")]
    documented = {row[0]: row[1] for row in rows if len(row) > 1}
    for alias, site in declared().aliases.items():
        if site != f"mixer.{alias}" and "." not in alias:  # the same name one module up needs no row
            assert documented[alias] == site


def test_formats_and_bundled_models_are_named_in_the_table():
    page = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    for name in [*FORMATS, *bundled_names()]:
        assert f"`{name}`" in page
    table = page.partition("## Formats\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(tinystories-[\w-]+)`", table)) == set(bundled_names())


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    for target in targets:
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def headings(path: Path) -> set[str]:
    """Anchors of a page's headings, as the hub of the repository makes them."""
    text = re.sub(r"^(`{3,}).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_to_headings_lead_somewhere(path: Path):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
        page = path.parent / target if target else path
        assert page.suffix != ".md" or anchor in headings(page), f"{path.name} links to {target}#{anchor}"


def test_figures_of_the_benchmarks_guide_are_those_of_the_tables():
    """Every number of a row's result stands in the section that the row links to."""
    tables = (ROOT / "docs" / "benchmark-tables.md").read_text(encoding="utf-8")
    sections = {
        re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-"): body
        for head, body in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", tables, re.M)
    }
    rows = re.findall(
        r"^\| \[.*?\]\(benchmark-tables\.md#([\w-]+)\)[^|]*\| ([^|]+) \|$",
        (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert len(rows) >= 6
    for anchor, result in rows:
        for figure in re.findall(r"\d+(?:\.\d+)?", result):
            shown = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", sections[anchor].replace(",", ""))}
            digits = len(figure.partition(".")[2])
            assert any(round(number, digits) == float(figure) for number in shown), f"{anchor}: {figure}"
