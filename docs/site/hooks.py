"""What mkdocs calls while it builds: pages that are made, and links and equations that are rewritten."""

from __future__ import annotations

import re

import notebook_pages
import reference
from mathml import with_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from repository import GUESTS, NOTEBOOKS, page_of, relink


def made_pages() -> dict[str, str]:
    """Pages that are no files of `docs/`: name on the site -> markdown. Notebooks in the order of their README."""
    pages = {f"reference/{package}.md": reference.page(package) for package in reference.PAGES}
    pages |= {name: (reference.ROOT / path).read_text(encoding="utf-8") for path, name in GUESTS.items()}
    listed = (reference.ROOT / NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    for path in sorted((reference.ROOT / NOTEBOOKS).glob("*.ipynb"), key=lambda path: listed.find(path.name)):
        pages[str(page_of(NOTEBOOKS + path.name))] = notebook_pages.page(path)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks and the reference into the navigation."""
    made = made_pages()
    for title, folder in (("Notebooks", "notebooks/"), ("Reference", "reference/")):
        assert config.nav is not None  # it is in mkdocs.yml
        config.nav.append({title: [name for name in made if name.startswith(folder)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made or brought."""
    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links as the site has them."""
    name = page.file.src_uri
    return markdown if name.startswith("reference/") else relink(markdown, name)


def on_page_content(html: str, **_: object) -> str:
    """Equations as MathML; Sphinx' roles in docstrings lose their names."""
    html = re.sub(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]*)</code>", r"<code>\1</code>", html)
    return with_mathml(html)
