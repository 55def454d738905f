"""`python -m tests.docs`: put what the documents' blocks print now into the text blocks behind them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.docs.blocks import ROOT, blocks_of, documents, run_blocks


def refresh(path: Path) -> int:
    """Rewrite a file's text blocks; how many changed."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run_blocks(path, Path(folder))
    lines, changed = path.read_text(encoding="utf-8").splitlines(), 0
    for block, text in reversed(list(zip(blocks_of(path), printed, strict=True))):
        if block.shown is not None:
            start, end = block.shown
            changed += lines[start:end] != text.splitlines()
            lines[start:end] = text.splitlines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return changed


if __name__ == "__main__":
    for document in documents():
        print(f"{document.relative_to(ROOT)}: {refresh(document)} changed")
