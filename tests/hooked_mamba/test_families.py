"""What a kind of block is, its own file says: no other file asks which kind it has before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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


SYMBOLS = {"E", "H", "P", "G", "N", "R", "K", "F", "d_state", "d_inner", "head_dim", "n_groups", "dt_rank"}
"""What only some kinds of configs and mixers have."""


OTHERS = {"asked == 'hybrid'"}
"""Comparisons with a family's name that mean something else: an old name of a coder's mode in circuits."""


def names_in(node: ast.AST) -> set[str]:
    """The last parts of all names below a node: {"MambaConfig"} of `config.MambaConfig`."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def texts_in(*nodes: ast.AST) -> set[str]:
    """All strings below some nodes."""
    parts = (part for node in nodes for part in ast.walk(node))
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def of_a_kind(node: ast.expr) -> bool:
    """Whether a compared value names a family, or a class of a kind."""
    return bool(texts_in(node) & FAMILIES) or bool(names_in(node) & KINDS)


def asks(tree: ast.Module) -> list[int]:
    """Lines that ask for a kind: isinstance of its class, its type or its family's name compared, a match on its class,
    hasattr or getattr with a default on a config or of a symbol that only some kinds have."""
    lines = []
    for node in ast.walk(tree):
        found = False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            called, rest = node.func.id, node.args[1:]
            maybe = called == "hasattr" or (called == "getattr" and len(node.args) == 3)
            found = called in ("isinstance", "issubclass") and any(map(of_a_kind, rest))
            found |= maybe and (ast.unparse(node.args[0]).endswith("cfg") or bool(texts_in(*rest[:1]) & SYMBOLS))
        elif isinstance(node, ast.Compare):
            found = ast.unparse(node) not in OTHERS and any(map(of_a_kind, (node.left, *node.comparators)))
        elif isinstance(node, (ast.MatchClass, ast.MatchValue)):
            found = of_a_kind(node.cls if isinstance(node, ast.MatchClass) else node.value)
        lines += [node.lineno] if found else []
    return lines


def test_no_file_asks_which_kind_it_has():
    found = []
    for package in ("hooked_mamba", "saes", "circuits"):
        for path in sorted((ROOT / package).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            if not where.startswith(MAY):
                found += [f"{where}:{line}" for line in asks(ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, found


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(m, Mamba2Mixer)",
        "isinstance(x, A | config.MambaConfig)",
        "issubclass(cls, (A, HookedMamba))",
        "hasattr(model.cfg, 'anything')",
        "getattr(cfg, 'anything', None)",
        "hasattr(mixer, 'd_state')",
        "x.family == 'mamba'",
        "kind in ('mamba', 'mamba2')",
        "type(cfg) is MambaConfig",
        "type(cfg) in (A, RWKV7Config)",
        "cls is HookedMamba2",
        "match cfg:\n    case DeltaNetConfig():\n        pass",
        "match kind:\n    case 'rwkv7':\n        pass",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert asks(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["isinstance(x, Tensor)", "type(cfg) is cls", "name == 'mambas'", "getattr(x, 'y', None)", "a = 'mamba'"]
)
def test_the_search_finds_nothing_else(source):
    assert not asks(ast.parse(source))
