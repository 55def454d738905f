"""What the site's build does beyond mkdocs: pages made from code and notebooks, and equations as MathML."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import notebook_pages  # noqa: E402
import reference  # noqa: E402

NOTEBOOKS = reference.ROOT / "demos" / "notebooks"


def on_files(files: Any, config: Any) -> Any:
    """Add the reference, and a page for every notebook."""
    for name in reference.PAGES:
        files.append(File.generated(config, f"api/{name}.md", content=reference.page(name)))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_pages.page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to notebooks to their pages here, and leave other links out of docs/ as plain text."""
    up = "../" if "/" in page.file.src_uri else ""
    markdown = re.sub(r"\]\(\.\./demos/notebooks/(\w+)\.ipynb\)", rf"]({up}notebooks/\1.md)", markdown)
    return markdown if up else re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Equations become MathML, which browsers draw by themselves; Sphinx' roles in docstrings lose their names."""

    def mathml(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "[" else "inline")

    content = re.sub(
        r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', mathml, content, flags=re.S
    )
    return re.sub(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]*)</code>", r"<code>\1</code>", content)
