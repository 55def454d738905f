"""Stages whose results are files: what is there already and still holds is not measured again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from demos.tinystories.checkpoint import write_atomically

Found = dict[str, Any]
"""What a stage found: plain values."""

DIGITS = 6
"""That results keep."""


@dataclass
class Stages:
    """The stages of one model and concept, in a folder.

    Parameters
    ----------
    folder
        One JSON file a stage.
    key
        What all results depend on, such as options and hashes of weights. Results with another key are measured again.
    bar
        Moves on by one with every stage.
    """

    folder: Path
    key: Found
    bar: tqdm | None = None
    measured: list[str] = field(default_factory=list)
    """Stages that were not on disk."""

    def run(self, name: str, measure: Callable[[], Found], beside: Sequence[Path] = ()) -> Found:
        """A stage's result, from its file or by measuring. Either way it is what the file holds.

        Parameters
        ----------
        beside
            Files that measuring writes as well; where one is missing it is done again.
        """
        path = self.folder / f"{name}.json"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.folder.name} {name}")
        found = self._read(path) if all(other.exists() for other in beside) else None
        if found is None:
            text = json.dumps({"key": self.key, "found": rounded(measure())}, indent=1, allow_nan=False)
            write_atomically(path, text.encode() + b"\n")
            self.measured.append(name)
            found = json.loads(text)["found"]
        if self.bar is not None:
            self.bar.update()
        return found

    def _read(self, path: Path) -> Found | None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("key") != json.loads(json.dumps(self.key)):
            return None
        return kept.get("found")


def rounded(value: Any) -> Any:
    """Floats to `DIGITS` significant digits; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


SHOWING = ("__main__.py", "claims.py", "planted_claims.py", "document.py", "figures.py", "page.py", "sections.py")
"""Files that say what was found, and do not find it."""


@cache
def source_hash() -> str:
    """Of this folder's code that measures: results of other code are stale."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in SHOWING:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
