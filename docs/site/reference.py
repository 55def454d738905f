"""The API reference: one page a package, made from what its `__init__` exports, so that no name can be missing."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES: dict[str, tuple[str, ...]] = {
    "hooked_mamba": ("hooked_mamba.sites", "hooked_mamba.utils"),
    "hooked_mamba.analysis": ("hooked_mamba.analysis.plots", "hooked_mamba.analysis.tasks"),
    "hooked_mamba.patching": (),
    "hooked_mamba.ops": (),
    "hooked_mamba.loading": (),
    "saes": ("saes.hub", "saes.metrics.probing", "saes.synthetic"),
    "saes.training": (),
    "saes.store": (),
    "saes.files": (),
    "saes.explorer": (),
    "circuits": ("circuits.files", "circuits.viewer"),
}
"""Page, named after its package -> modules that are shown whole behind the package's exports."""


def parse(module: str) -> ast.Module:
    """A module's source, not run."""
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def exports(module: str) -> list[str]:
    """Public names in their order: what is imported as itself (`X as X`), and what is defined there."""
    names: list[str] = []
    for node in parse(module).body:
        match node:
            case ast.ImportFrom():
                names += [alias.name for alias in node.names if alias.asname == alias.name]
            case ast.FunctionDef() | ast.ClassDef():
                names.append(node.name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
    return [name for name in names if not name.startswith("_")]


def page(package: str) -> str:
    """The page of a package: its docstring, its exports and its modules, as mkdocstrings reads them."""
    names = [*(f"{package}.{name}" for name in exports(package)), *PAGES[package]]
    return "\n\n".join([f"# {package}", ast.get_docstring(parse(package)) or "", *(f"::: {name}" for name in names)])
