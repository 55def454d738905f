"""The API reference: pages made from what the packages export, so that no name can be missing."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES: dict[str, list[str]] = {
    "hooked_mamba": ["hooked_mamba", "hooked_mamba.loading"],
    "analysis": ["hooked_mamba.analysis", "hooked_mamba.patching", "hooked_mamba.analysis.plots", "hooked_mamba.utils"],
    "saes": ["saes", "saes.hub", "saes.files"],
    "training": ["saes.training", "saes.store"],
    "circuits": ["circuits"],
}
"""Page -> packages, of which it has the exports, and modules, of which it has everything public."""


def exports(package: str) -> dict[str, list[str]]:
    """What a package's `__init__` exports as `X as X`: module -> names, in the order they stand there."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(source(package).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names if alias.asname == alias.name]
            found.setdefault(node.module, []).extend(names)
    return {module: names for module, names in found.items() if names}


def source(name: str) -> Path:
    """The file of a module, or a package's `__init__`."""
    folder = ROOT / name.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def page(title: str) -> str:
    """One page's markdown: a directive of mkdocstrings for every module that something is exported from."""
    lines = [f"# {', '.join(name for name in PAGES[title] if source(name).name == '__init__.py')}"]
    for name in PAGES[title]:
        if source(name).name != "__init__.py":
            lines.append(directive(name))
            continue
        for module, names in exports(name).items():
            modules = [inner for inner in names if source(f"{module}.{inner}").exists()]
            lines += [directive(f"{module}.{inner}") for inner in modules]
            if rest := [inner for inner in names if inner not in modules]:
                lines.append(directive(module, rest))
    return "\n\n".join(lines) + "\n"


def directive(module: str, members: list[str] | None = None) -> str:
    """A module's docstring and members; None: all that are public."""
    return f"::: {module}" + (f"\n    options:\n      members: {members}" if members else "")
