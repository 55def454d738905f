"""Which backend runs, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from inspect import unwrap as unchecked
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hooked_mamba import ops
from hooked_mamba.ops import StateEdits, checks, selective_scan, ssd
from tests.hooked_mamba.ops.cases import selective_inputs, ssd_inputs

X = torch.zeros(1, 2, 3)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _name(chosen: ops.Backend) -> str:
    assert chosen.run.__module__ == ops.BACKENDS[chosen.op][chosen.name]
    return chosen.name


def test_the_fastest_that_can():
    assert _name(ops.choose("selective_scan", X)) == "numba"
    assert _name(ops.choose("selective_scan", X.half())) == "numba"
    assert _name(ops.choose("selective_scan", X.double())) == "torch"
    assert _name(ops.choose("ssd", X)) == "numba"
    assert _name(ops.choose("ssd", X.double())) == "torch"
    assert _name(ops.choose("linear_scan", X)) == "torch"


def test_every_op_has_the_backends_that_it_should():
    assert {op: " ".join(table) for op, table in ops.BACKENDS.items()} == {
        "selective_scan": "triton numba torch naive mamba_ssm",
        "gated_scan": "triton numba torch naive mamba_ssm",
        "pull_scan": "triton numba torch naive mamba_ssm",
        "ssd": "triton numba torch naive mamba_ssm",
        "delta_scan": "triton numba torch naive",
        "linear_scan": "triton torch naive",
        "causal_conv1d": "triton numba torch",
        "silu": "numba torch",
        "softplus": "numba torch",
    }


def test_a_named_backend():
    assert _name(ops.choose("selective_scan", X, backend="torch")) == "torch"
    assert _name(ops.choose("ssd", X, backend="naive")) == "naive"
    assert _name(ops.choose("ssd", X, backend="auto")) == "numba"


def test_the_environment_names_a_backend_and_an_argument_outranks_it(monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT, "naive")
    assert _name(ops.choose("selective_scan", X)) == "naive"
    assert _name(ops.choose("selective_scan", X, backend="torch")) == "torch"
    assert _name(ops.choose("selective_scan", X, backend="auto")) == "numba"


def test_the_environment_binds_only_ops_that_have_the_backend(monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT, "numba")
    assert _name(ops.choose("selective_scan", X)) == "numba"
    assert _name(ops.choose("linear_scan", X)) == "torch"


def test_an_unknown_name_lists_the_valid_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"backend is 'numbra', expected one of 'auto', .*'numba'.*'naive'"):
        selective_scan(**_float32(), backend="numbra")
    with pytest.raises(ValueError, match="backend is 'numba', expected one of"):
        ops.choose("linear_scan", X, backend="numba")
    monkeypatch.setenv(ops.ENVIRONMENT, "numbra")
    with pytest.raises(ValueError, match=r"HOOKED_MAMBA_SCAN is 'numbra'"):
        selective_scan(**_float32())


def test_a_named_backend_that_cannot_says_why_and_who_can():
    with pytest.raises(RuntimeError, match=r"float64; able here: 'auto', 'torch', 'naive'"):
        selective_scan(**selective_inputs(1, 2, 3, 4), backend="numba")


@pytest.fixture
def choosing() -> Iterator[ModuleType]:
    """The module that chooses, which forgets afterwards what it could not import."""
    module = importlib.import_module("hooked_mamba.ops.choose")
    module._import.cache_clear()
    yield module
    module._import.cache_clear()


def test_a_backend_that_is_not_installed(choosing, monkeypatch):
    monkeypatch.setitem(sys.modules, "hooked_mamba.ops.selective_scan.numba", None)
    assert _name(ops.choose("selective_scan", X)) == "torch"
    with pytest.raises(RuntimeError, match="not installed"):
        ops.choose("selective_scan", X, backend="numba")


def test_a_backend_that_breaks_at_import_warns_once(choosing, monkeypatch):
    def broken(name):
        raise AttributeError("no attribute 'njit'")

    with monkeypatch.context() as patch:
        patch.setattr(choosing.importlib, "import_module", broken)
        with pytest.warns(UserWarning, match=r"selective_scan.numba is left out: .*njit"):
            reason = choosing._load("selective_scan", "numba")
        assert choosing._load("selective_scan", "numba") is reason


def test_nothing_optional_is_imported_with_the_ops():
    """Backends are found without being imported: numba and triton take a while."""
    code = (
        "import sys, hooked_mamba.ops; print({'numba', 'triton', 'llvmlite'} & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


BACKEND = """
from hooked_mamba.ops import ScanOut, backend

def refuses(x, N):
    return f"no {N} states" if N == 5 else None

@backend("selective_scan", takes={"h0", "states", "grad"}, refuses=refuses)
def selective_scan(x, dt, A, B, C, D, *, h0, positions):
    SEEN.update(positions=positions, h0=h0, frozen=not dt.requires_grad)
    return ScanOut(x, x.new_zeros(1, 3, 4), None)
"""


def with_new_backend(choosing: ModuleType, monkeypatch, tmp_path: Path, name: str, source: str, op: str) -> dict:
    """Put a file into an op's folder, which is all that a new backend takes; returns what the file calls SEEN."""
    folder = importlib.import_module(f"hooked_mamba.ops.{choosing.FOLDERS[op]}")
    seen: dict = {}
    (tmp_path / f"{name}.py").write_text(source.replace("SEEN", f"__import__('builtins').{name}_seen"))
    monkeypatch.setattr("builtins." + f"{name}_seen", seen, raising=False)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    names = sorted([*choosing.BACKENDS[op], *choosing.backends_in(tmp_path)], key=choosing.preference)
    table = {each: f"{folder.__name__}.{each}" for each in names}
    monkeypatch.setitem(ops.BACKENDS, op, table)
    return seen


def test_a_new_backend_is_one_file(choosing, monkeypatch, tmp_path):
    seen = with_new_backend(choosing, monkeypatch, tmp_path, "brand_new", BACKEND, "selective_scan")
    inputs = {k: v.requires_grad_() for k, v in _float32().items()}
    selective_scan(**inputs, states_at="all", frozen=True)
    assert seen["positions"] == (0, 1)
    assert seen["frozen"]
    selective_scan(**inputs, edits=StateEdits([0], torch.zeros(())), frozen=True)
    assert torch.equal(seen["h0"], torch.zeros(1, 3, 4)), "cut after the edit, the second half starts from its state"
    assert _name(ops.choose("selective_scan", X, 5)) == "numba"
    with pytest.raises(RuntimeError, match=r"backend is 'brand_new', but no 5 states; able here: 'auto', 'numba'"):
        ops.choose("selective_scan", X, 5, backend="brand_new")


def test_what_a_backend_does_not_take_it_refuses(choosing, monkeypatch, tmp_path):
    source = BACKEND.replace('takes={"h0", "states", "grad"}', 'takes={"grad"}')
    with_new_backend(choosing, monkeypatch, tmp_path, "without_states", source, "selective_scan")
    for feature, reason in (("h0", "it starts from a state of zero"), ("states", "it does not save states")):
        assert _name(ops.choose("selective_scan", X, 1, frozenset({feature}))) == "numba"
        with pytest.raises(RuntimeError, match=f"'without_states', but {reason}"):
            ops.choose("selective_scan", X, 1, frozenset({feature}), "without_states")


def test_a_backend_registers_what_there_is():
    with pytest.raises(ValueError, match="no op 'skan'"):
        ops.backend("skan")
    with pytest.raises(ValueError, match="'colour'"):
        ops.backend("ssd", takes={"colour"})


GATED = """
import torch
from hooked_mamba.ops import backend

@backend("gated_scan", takes=TAKES)
def gated_scan(x, dt_pre, A, B, C, D, z, h0):
    SEEN.setdefault("calls", []).append(torch.is_grad_enabled())
    return 2 * x, h0
"""


@pytest.mark.parametrize("has_gradient", [False, True])
def test_softplus_scan_and_gate_in_one_pass_with_gradients_if_the_backend_says_so(
    has_gradient, choosing, monkeypatch, tmp_path
):
    source = GATED.replace("TAKES", str({"h0", "grad"} if has_gradient else {"h0"}))
    name = f"one_pass_{has_gradient}"  # a module is imported once
    seen = with_new_backend(choosing, monkeypatch, tmp_path, name, source, "gated_scan")
    inputs = _float32()
    inputs["dt_pre"], inputs["z"] = inputs.pop("dt"), torch.ones(1, 2, 3)
    with torch.no_grad():
        assert torch.equal(ops.gated_scan(**inputs)[0], 2 * inputs["x"])
    inputs["x"].requires_grad_()
    y, _ = ops.gated_scan(**inputs)
    assert torch.equal(y, 2 * inputs["x"]) == has_gradient
    assert seen["calls"] == [False, True][: 1 + has_gradient]
    inputs["z"] = torch.ones(1, 2, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="gated_scan: z has shape"):
        unchecked(ops.gated_scan)(**inputs)


def _float32():
    return {k: v.float() for k, v in selective_inputs(1, 2, 3, 4).items()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dt": torch.zeros(1, 2, 4)}, ValueError, r"dt has shape \(1, 2, 4\), expected \(b=1, l=2, E=3\)"),
        ({"A": torch.zeros(4, 4)}, ValueError, r"A has shape \(4, 4\), expected \(E=3, N"),
        ({"B": torch.zeros(1, 2, 5)}, ValueError, "B has shape"),
        ({"C": torch.zeros(1, 3, 4)}, ValueError, "C has shape"),
        ({"D": torch.zeros(4)}, ValueError, "D has shape"),
        ({"h0": torch.zeros(1, 4, 3)}, ValueError, r"h0 has shape \(1, 4, 3\), expected \(b=1, E=3, N=4\)"),
        ({"states_at": [0, 2]}, ValueError, r"states_at\[1\] is 2, expected a position in \[0, 2\)"),
        ({"states_at": [-1]}, ValueError, r"states_at\[0\] is -1"),
        ({"states_at": [1, 0]}, ValueError, "strictly ascending, got 1 before 0"),
        ({"states_at": [1, 1]}, ValueError, "strictly ascending"),
        ({"states_at": "last"}, ValueError, "states_at is 'last', expected positions, 'all' or None"),
        ({"edits": StateEdits([2], torch.ones(()))}, ValueError, r"edits.at\[0\] is 2"),
        ({"edits": StateEdits([0], torch.ones(2, 1, 3, 4))}, ValueError, r"edits.scale has shape \(2, 1, 3, 4\)"),
        ({"edits": StateEdits([0], None, torch.ones(5))}, ValueError, r"does not broadcast to \(1, 1, 3, 4\)"),
    ],
)
def test_wrong_arguments_of_selective_scan(change, error, message):
    with pytest.raises(error, match=message):
        unchecked(selective_scan)(**(_float32() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(3)}, r"A has shape \(3,\), expected \(H=4\)"),
        ({"dt": torch.zeros(1, 2, 4, 1)}, "dt has shape"),
        ({"h0": torch.zeros(1, 4, 5, 3)}, r"h0 has shape \(1, 4, 5, 3\), expected \(b=1, H=4, P=3, N=5\)"),
        ({"B": torch.zeros(1, 2, 3, 5), "C": torch.zeros(1, 2, 3, 5)}, "4 heads do not divide into 3 groups"),
        ({"chunk": 0}, "chunk is 0"),
        ({"states_at": [5]}, "states_at"),
    ],
)
def test_wrong_arguments_of_ssd(change, message):
    with pytest.raises(ValueError, match=message):
        unchecked(ssd)(**(ssd_inputs(1, 2, 4, 3, 2, 5) | change))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        selective_scan(**selective_inputs(1, 0, 3, 4))
    with pytest.raises(ValueError, match="empty"):
        ssd(**ssd_inputs(1, 0, 4, 3, 2, 5))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got a tensor of torch.int64"):
        unchecked(selective_scan)(**(_float32() | {"x": torch.zeros(1, 2, 3, dtype=torch.long)}))
    with pytest.raises(TypeError, match="states_at must hold integers"):
        unchecked(checks.ascending)("selective_scan", "states_at", [0.5], 2)


def test_no_positions_are_no_states():
    assert selective_scan(**_float32(), states_at=[]).states is None
    assert selective_scan(**_float32(), states_at=torch.tensor([0, 1]).tolist()).states.shape == (1, 2, 3, 4)


def test_edits_that_change_nothing():
    plain = selective_scan(**_float32())
    for edits in (StateEdits([]), StateEdits([1])):
        assert torch.equal(selective_scan(**_float32(), edits=edits).y, plain.y)
