"""What a kind of block is, its own file says: no other file asks which kind it has before it."""

from __future__ import annotations

import ast
from pathlib import Path

from hooked_mamba.config import BranchConfig
from hooked_mamba.mixers.base import Branch
from hooked_mamba.models import MODELS

ROOT = Path(__file__).parents[2]
MAY = ("hooked_mamba/mixers/", "hooked_mamba/loading/")


def below(cls: type) -> set[type]:
    return {cls}.union(*(below(other) for other in cls.__subclasses__()))


KINDS = {cls.__name__ for cls in (below(Branch) - {Branch}) | set(MODELS.values())}
KINDS |= {
    cls.__name__ for cls in below(BranchConfig) if cls.__name__ not in ("BranchConfig", "ModelConfig", "SSMConfig")
}
FAMILIES = set(MODELS)


def asks(tree: ast.Module) -> list[int]:
    """Lines that ask for a kind: isinstance of its class, its family's name compared, a config's own field."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named = {part.id for argument in node.args[1:] for part in ast.walk(argument) if isinstance(part, ast.Name)}
            of_config = bool(node.args) and ast.unparse(node.args[0]).endswith("cfg")
            if node.func.id in ("isinstance", "issubclass") and named & KINDS:
                lines.append(node.lineno)
            if node.func.id == "hasattr" and of_config:
                lines.append(node.lineno)
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            texts = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            if texts & FAMILIES and any(ast.unparse(part).endswith("family") for part in parts):
                lines.append(node.lineno)
    return lines


def test_no_file_asks_which_kind_it_has():
    found = []
    for package in ("hooked_mamba", "saes", "circuits"):
        for path in sorted((ROOT / package).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            if not where.startswith(MAY):
                found += [f"{where}:{line}" for line in asks(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, found


def test_the_search_finds_what_it_looks_for():
    source = "isinstance(m, Mamba2Mixer)\nhasattr(model.cfg, 'H')\nx.family == 'mamba'\nisinstance(x, A | MambaConfig)"
    assert sorted(asks(ast.parse(source))) == [1, 2, 3, 4]
