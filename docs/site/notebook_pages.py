"""Notebooks as pages: their text, their code, and what it printed."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

FENCE = "````"


def page(path: Path) -> str:
    """A notebook as markdown; figures are left to Jupyter."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in parts(cell)) + "\n"


def parts(cell: dict[str, Any]) -> list[str]:
    """A cell's source, and each of its outputs."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [text]
    return [f"{FENCE}python\n{text}\n{FENCE}", *(shown(output) for output in cell.get("outputs", ()))]


def shown(output: dict[str, Any]) -> str:
    """One output: HTML as it is, any other as text."""
    if output["output_type"] == "stream":
        return f"{FENCE}text\n{''.join(output['text']).rstrip()}\n{FENCE}"
    data = output.get("data", {})
    if "application/vnd.plotly.v1+json" in data:
        title = data["application/vnd.plotly.v1+json"]["layout"].get("title", {}).get("text", "")
        return f"*A figure: {html.escape(title)}.*" if title else "*A figure.*"
    if "text/html" in data:
        return f"<div>{unbroken(''.join(data['text/html']))}</div>"
    return f"{FENCE}text\n{''.join(data.get('text/plain', ''))}\n{FENCE}"


def unbroken(text: str) -> str:
    """HTML that markdown takes as one block, for which a blank line would be the end.

    A page in a frame keeps every byte: its policy runs only the very script that it knows.
    """
    text = re.sub(r'srcdoc="[^"]*"', lambda frame: frame[0].replace("\n", "&#10;"), text)
    return re.sub(r"\n\s*\n", "\n", text)
