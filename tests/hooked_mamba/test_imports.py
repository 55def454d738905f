"""The order of imports, and what may be imported where: read from the source, nothing is run."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "hooked_mamba": set(),
    "saes": {"hooked_mamba"},
    "circuits": {"saes", "hooked_mamba"},
    "demos": {"circuits", "saes", "hooked_mamba"},
}
"""demos -> circuits -> saes -> hooked_mamba, never back."""

PACKAGES = [name for name in MAY_IMPORT if name != "demos"]

STRATA = (
    {"transformerlens_names"},
    {"names_elsewhere"},
    {"config", "ops", "display", "lazy", "renamed", "layers", "factored_matrix", "durable", "world", "local_paths"},
    {"recurrent_config", "pieces"},
    {"hybrid_config", "documents"},
    {"hooks"},
    {"state", "memory", "hook_points"},
    {"components"},
    {"frozen"},
    {"scan_view", "token_sources"},
    {"mixers"},
    {"decomposition"},
    {"unit_decomposition", "ssm_decomposition", "weights"},
    {"activation_cache"},
    {"model"},
    {"models", "site_tables", "model_hash"},
    {"frozen.places"},
    {"frozen.layerwise"},
    {"frozen.beginning"},
    {"frozen.run"},
    {"analysis"},
    {"patching", "utils", "verification"},
)
"""Each part of hooked_mamba in one, none of which imports a later one. frozen.run, a model's run of a prompt, stands
above models; the pieces that it is made of stand below mixers, which say what they are made of."""

ABOVE_ALL = {"cli", "__main__"}
"""Commands may use everything."""

OPS = sorted(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "hooked_mamba/ops").glob("*/op.py"))

ONLY_IN = {
    "triton": ("hooked_mamba/ops/triton_", *(f"{folder}/_triton_" for folder in OPS), "saes/triton_bag.py"),
    "numba": ("hooked_mamba/ops/numba_", *(f"{folder}/{name}" for folder in OPS for name in ("numba.py", "_numba_"))),
    "llvmlite": ("hooked_mamba/ops/numba_",),
    "mamba_ssm": tuple(f"{folder}/mamba_ssm.py" for folder in OPS),
    "causal_conv1d": (),
}
"""Optional libraries, and the files that may import them."""

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> list[str]:
    """Full names of the modules that a file imports anywhere in it, under TYPE_CHECKING as well: whoever reads a file
    needs those too."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if is_module(name) else node.module for name in names]
        elif isinstance(node, ast.Call) and called_by(node).endswith("import_module"):
            found += [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return found


def called_by(call: ast.Call) -> str:
    """`torch.load` of torch.load(path); empty where what is called has no name."""
    return ast.unparse(call.func) if isinstance(call.func, ast.Name | ast.Attribute) else ""


@functools.cache
def imports() -> dict[str, list[str]]:
    """Module -> what it imports."""
    return {name_of(path): imports_of(path) for path in FILES}


def part_of(module: str) -> str:
    """mixers of hooked_mamba.mixers.mamba1; two names where STRATA places a module apart from its folder."""
    _, *names = module.split(".")
    apart = ".".join(names[:2])
    return apart if any(apart in parts for parts in STRATA) else ".".join(names[:1])


def stratum(part: str) -> int | None:
    return next((i for i, parts in enumerate(STRATA) if part in parts), None)


def inside() -> list[tuple[str, str]]:
    """Imports within hooked_mamba, the package's own re-exports apart."""
    return [
        (module, other)
        for module, others in imports().items()
        if module.startswith("hooked_mamba.")
        for other in others
        if other.startswith("hooked_mamba.")
    ]


def test_the_packages_import_downwards():
    for module, others in imports().items():
        package = module.split(".")[0]
        for other in others:
            top = other.split(".")[0]
            if top in MAY_IMPORT and top != package:
                assert top in MAY_IMPORT[package], f"{module} imports {other}"


def test_every_module_has_its_place():
    parts = {part_of(module) for module in imports() if module.startswith("hooked_mamba.")}
    known = set().union(*STRATA, ABOVE_ALL, {"loading", "pretrained"})
    assert parts <= known, f"say in STRATA where these stand: {sorted(parts - known)}"


def test_strata_import_downwards():
    for module, other in inside():
        mine, theirs = stratum(part_of(module)), stratum(part_of(other))
        if part_of(module) not in ABOVE_ALL and mine is not None and theirs is not None:
            assert theirs <= mine, f"{module} imports {other}, which stands above it"


def test_loading_knows_only_config_and_tensors():
    for module, other in inside():
        if part_of(module) == "loading":
            assert part_of(other) in {"loading", "config", "hybrid_config", "recurrent_config", "local_paths"}, (
                f"{module} imports {other}"
            )
        elif part_of(other) == "loading":
            assert part_of(module) in {"model", "models", "verification", *ABOVE_ALL}, f"{module} imports {other}"


def test_imports_for_types_count(tmp_path):
    path = tmp_path / "some.py"
    path.write_text("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from saes.coder import SAE\n")
    assert imports_of(path) == ["typing", "saes.coder"]


def test_ops_know_nothing_of_models():
    for module, other in inside():
        if part_of(module) == "ops":
            assert part_of(other) == "ops", f"{module} imports {other}"


def test_there_are_no_cycles():
    graph = {m: {o for o in others if o in imports() and o != m} for m, others in imports().items()}
    # A package re-exports its own modules, which may name it: `from package import sibling` is no dependence on all.
    graph = {m: {o for o in others if not m.startswith(f"{o}.")} for m, others in graph.items()}
    while free := [m for m, others in graph.items() if not others]:
        graph = {m: others - set(free) for m, others in graph.items() if m not in free}
    assert not graph, f"modules that import each other: {sorted(graph)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_optional_libraries_are_imported_where_they_belong(library):
    for path in FILES:
        where = path.relative_to(ROOT).as_posix()
        if any(other.split(".")[0] == library for other in imports()[name_of(path)]):
            assert where.startswith(ONLY_IN[library]), f"{where} imports {library}"
    if library == "triton":
        assert any("triton" in imports()[name_of(path)] for path in FILES), "the walk found no import of triton at all"


def test_nothing_that_runs_what_it_reads():
    """No pickle, no eval or exec, torch.load only of weights, no remote code."""
    for path in FILES:
        where = path.relative_to(ROOT)
        assert not {"pickle", "dill", "cloudpickle", "marshal"} & {n.split(".")[0] for n in imports()[name_of(path)]}, (
            where
        )
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            called = called_by(node)
            assert called not in ("eval", "exec", "__import__"), f"{where}:{node.lineno} calls {called}"
            keywords = {
                k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ("weights_only", "trust_remote_code")
            }
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{where}:{node.lineno}"
            assert keywords.get("trust_remote_code", "False") == "False", f"{where}:{node.lineno}"


def test_files_are_small():
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines"
