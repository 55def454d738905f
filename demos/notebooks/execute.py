"""Notebooks run in fresh kernels, and kept without what differs from one run or one machine to another."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

from demos.notebooks.rounded import alike

FOLDER = Path(__file__).parent

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PLOTLY_RENDERER": "plotly_mimetype",  # figures as data, without plotly's script of several megabytes
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where ipywidgets is not installed
}
"""Of the kernels' environment."""

VARIES = "varies"
"""Tag of cells whose numbers come from a long chain of roundings, such as training, and may differ elsewhere."""

FIGURE = "application/vnd.plotly.v1+json"


def notebooks() -> dict[str, Path]:
    """All of them, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}


def read(path: Path) -> Any:
    """A notebook of format 4.

    Raises
    ------
    nbformat.ValidationError
        It is none.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: Any, timeout: int = 300) -> Any:
    """A copy with the outputs of a run in an empty folder.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell that fails.
    """
    notebook = nbformat.from_dict(notebook)
    # IPYTHONDIR: not the user's own settings and history.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {**SETTINGS, "IPYTHONDIR": folder}):
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute()
    return _tidied(notebook)


def write(path: Path, notebook: Any) -> None:
    """Store it, with its cells' ids in order."""
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    nbformat.write(notebook, path)


def texts(notebook: Any) -> list[str]:
    """What each code cell printed or returned as text; figures and tables of HTML by their kinds alone."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        shown = []
        for output in cell.outputs:
            if output.output_type == "stream":
                shown.append(output.text)
            else:
                kinds = sorted(output.data)
                shown.append("".join(output.data["text/plain"]) if kinds == ["text/plain"] else " ".join(kinds))
        found.append("\n".join(shown))
    return found


def differences(stored: Any, new: Any) -> list[str]:
    """What two runs of a notebook show differently, beyond rounding (`alike`) and cells tagged "varies"."""
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    return [
        f"{cell.source}\nshowed\n{was}\nand now shows\n{now}"
        for cell, was, now in zip(cells, texts(stored), texts(new), strict=True)
        if not alike(was, now) and VARIES not in cell.metadata.get("tags", [])
    ]


def _tidied(notebook: Any) -> Any:
    """Without the kernel's version and figures' templates, and with a few words for readers that show text alone."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": [VARIES]} if VARIES in cell.metadata.get("tags", []) else {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if FIGURE in data:
                layout = data[FIGURE]["layout"]
                layout.pop("template", None)  # most of a small figure's size, and hardly seen
                data["text/plain"] = f"[figure: {layout.get('title', {}).get('text', 'untitled')}]"
            elif "text/html" in data:  # as text it would be there a second time
                name = re.match(r"(\w+)\(", data["text/plain"])
                data["text/plain"] = f"[{name[1] if name else 'table'}]"
    return notebook
