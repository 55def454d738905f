"""`python -m tests.oldest`: the lowest versions that pyproject.toml promises, as constraints for pip.

torch is left out, since its old wheels for the CPU lie elsewhere: `make test-oldest TORCH=torch==2.6.0`. click is
added, since old releases of typer do not bound it, and import what new ones deprecate.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lowest(requirements: list[str]) -> dict[str, str]:
    """Package -> the lower bound of its range.

    Raises
    ------
    ValueError
        A requirement without one.
    """
    found = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} promises no lowest version: write name>=version")
        found[match[1]] = match[2]
    return found


def dependencies() -> list[str]:
    """What pyproject.toml says that the package needs, to read GGUF files as well."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["gguf"]]


def constraints() -> list[str]:
    """Lines of a constraints file."""
    versions = {name: version for name, version in lowest(dependencies()).items() if name != "torch"}
    return [f"{name}=={version}" for name, version in {**versions, "click": "8.2.1"}.items()]


if __name__ == "__main__":
    print("\n".join(constraints()))
