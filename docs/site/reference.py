"""The API reference: one page a package, made from what its `__init__` exports, so that no name can be missing."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES: dict[str, tuple[str, ...]] = {
    "hooked_mamba": ("hooked_mamba.hooks.names", "hooked_mamba.hooks.site", "hooked_mamba.utils"),
    "hooked_mamba.analysis": ("hooked_mamba.analysis.plots", "hooked_mamba.analysis.tasks"),
    "hooked_mamba.patching": (),
    "hooked_mamba.ops": (),
    "hooked_mamba.loading": (),
    "hooked_mamba.cli": (),
    "saes": ("saes.hub", "saes.metrics.probing", "saes.synthetic"),
    "saes.training": (),
    "saes.store": (),
    "saes.files": (),
    "saes.explorer": (),
    "saes.activations": (),
    "circuits": ("circuits.files",),
    "circuits.interventions": (),
    "circuits.viewer": (),
}
"""Page, named after its package -> modules that are shown whole behind the package's exports."""


def parse(module: str) -> ast.Module:
    """A module's source, not run."""
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))


def listed(package: str) -> list[ast.stmt]:
    """What says the names of a package: its `__init__`, and the stub beside it where names are imported when asked."""
    stub = ROOT / package.replace(".", "/") / "__init__.pyi"
    return [*parse(package).body, *(ast.parse(stub.read_text(encoding="utf-8")).body if stub.is_file() else ())]


def exports(package: str) -> dict[str, str]:
    """Public names of a package in their order -> where they are defined, as far as the packages tell.

    The place of definition, since a function may be named like its module: `circuits.faithfulness` is the module.
    """
    found: dict[str, str] = {}
    for node in listed(package):
        match node:
            case ast.ImportFrom(module=str(module)):
                found |= {a.name: definition(module, a.name, package) for a in node.names if a.asname == a.name}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = f"{package}.{name}"
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = f"{package}.{name}"
    return {name: place for name, place in found.items() if not name.startswith("_")}


def definition(module: str, name: str, package: str) -> str:
    """Where a package's import leads: through another package's exports, to a module's own name, or to a submodule."""
    if module in PAGES and module != package:
        return exports(module)[name]
    return f"{module}.{name}"


def page(package: str) -> str:
    """The page of a package: its docstring, its exports and its modules, as mkdocstrings reads them.

    What an earlier page shows is linked to.
    """
    pages = list(PAGES)
    earlier = {place for other in pages[: pages.index(package)] for place in exports(other).values()}
    here = exports(package)
    shown = [p for p in here.values() if p not in earlier and p.rpartition(".")[0] not in PAGES[package]]
    linked = ", ".join(f"[`{name}`][{place}]" for name, place in here.items() if place in earlier)
    parts = [f"# {package}", ast.get_docstring(parse(package)) or "", f"Also from here: {linked}." if linked else ""]
    return "\n\n".join(filter(None, [*parts, *(f"::: {name}" for name in (*shown, *PAGES[package]))]))
