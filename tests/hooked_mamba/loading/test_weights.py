"""Strict assignment."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooked_mamba.config import MambaConfig
from hooked_mamba.loading import CheckpointError, load_into, save_checkpoint, target_dtype
from hooked_mamba.loading.tables import LazyState
from hooked_mamba.loading.tensor_files import REMAP_BYTES
from hooked_mamba.model.shapes import weight_shapes
from tests.hooked_mamba.loading.builders import assert_same, module_of


def some_state():
    names = ["embed.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.dt_proj.bias", "blocks.0.mixer.D"]
    shapes = [(5, 3), (6, 2), (6,), (6,)]
    return {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}


def test_weights_are_assigned_as_copies():
    state = some_state()
    module = module_of(state)
    load_into(module, state)
    assert_same(module.state_dict(), state)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad and p.is_leaf for p in module.parameters())
    with torch.no_grad():
        module.embed.weight.zero_()
    assert state["embed.weight"].abs().sum() > 0


def test_requires_grad_is_kept():
    state = some_state()
    module = module_of(state).requires_grad_(False)
    load_into(module, state)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_sits_inside_an_exponential_stays_float32_in_half_precision(dtype):
    state = some_state()
    module = module_of(state)
    load_into(module, state, dtype=dtype)
    kept = torch.float32 if dtype.itemsize == 2 else dtype
    assert {n: p.dtype for n, p in module.named_parameters()} == {
        "embed.weight": dtype,
        "blocks.0.mixer.A_log": kept,
        "blocks.0.mixer.dt_proj.bias": kept,
        "blocks.0.mixer.D": kept,
    }
    assert torch.equal(module.embed.weight, state["embed.weight"].to(dtype))
    assert torch.equal(module.get_parameter("blocks.0.mixer.A_log"), state["blocks.0.mixer.A_log"].to(kept))


def test_names_that_only_end_alike_are_not_kept():
    kept = {"blocks.0.mixer.D", "dt_bias"}
    assert target_dtype("blocks.0.mixer.D", torch.float16, kept) == torch.float32
    assert target_dtype("dt_bias", torch.float16, kept) == torch.float32
    assert target_dtype("dt_bias", torch.float64, kept) == torch.float64
    assert target_dtype("blocks.0.mixer.conv1d.bias", torch.float16, kept) == torch.float16
    assert target_dtype("blocks.0.mixer.NOT_D", torch.float16, kept) == torch.float16


def test_by_default_each_parameter_keeps_the_modules_dtype():
    state = some_state()
    module = module_of(state).to(torch.bfloat16)
    load_into(module, state)
    assert module.embed.weight.dtype == torch.bfloat16
    assert module.get_parameter("blocks.0.mixer.D").dtype == torch.float32


def test_tied_parameters_stay_one():
    state = some_state()
    module = module_of(state, tied=True)
    load_into(module, state)
    assert module.unembed.weight is module.embed.weight
    assert torch.equal(module.unembed.weight, state["embed.weight"])
    swapped = {"unembed.weight" if n == "embed.weight" else n: t for n, t in state.items()}
    load_into(module, swapped)
    assert module.unembed.weight is module.embed.weight


def test_one_error_lists_every_fault_and_changes_nothing():
    state = some_state()
    module = module_of(state, device="cpu")
    before = {n: p.clone() for n, p in module.state_dict().items()}
    bad = dict(state)
    del bad["blocks.0.mixer.D"]
    bad["blocks.0.mixer.A_log"] = torch.zeros(6, 3)
    bad["blocks.1.norm.weight"] = torch.zeros(3)
    bad["embed.weight"] = state["embed.weight"].clone()
    bad["embed.weight"][0, 0], bad["embed.weight"][1, 1] = float("nan"), float("-inf")
    with pytest.raises(CheckpointError) as error:
        load_into(module, bad)
    lines = str(error.value).splitlines()
    assert "4 faults" in lines[0]
    assert {line.strip() for line in lines[1:]} == {
        "missing: blocks.0.mixer.D (6,)",
        "shape: blocks.0.mixer.A_log got (6, 3), expected (6, 2)",
        "unexpected: blocks.1.norm.weight (3,)",
        "not finite: embed.weight has 2 NaN or infinite values of 15",
    }
    assert_same(module.state_dict(), before)


def test_non_finite_alone_changes_nothing_either():
    state = some_state()
    module = module_of(state, device="cpu")
    state["blocks.0.mixer.D"][3] = float("inf")
    with pytest.raises(CheckpointError, match=r"not finite: blocks\.0\.mixer\.D has 1"):
        load_into(module, state)
    assert all(p.abs().sum() == 0 for p in module.parameters())


def test_an_overflow_is_told_from_a_bad_file():
    state = some_state()
    state["embed.weight"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"overflow: embed\.weight has 1 values too large for torch\.float16"):
        load_into(module_of(state), state, dtype=torch.float16)
    load_into(module_of(state), state, dtype=torch.bfloat16)


def test_integers_and_empty_weights_are_refused():
    state = some_state()
    with pytest.raises(CheckpointError, match=r"dtype: embed\.weight got torch\.int8"):
        load_into(module_of(state), state | {"embed.weight": torch.zeros(5, 3, dtype=torch.int8)})
    meta = state | {"embed.weight": torch.zeros(5, 3, device="meta")}
    with pytest.raises(CheckpointError, match=r"no data: embed\.weight is on the meta device"):
        load_into(module_of(state), meta, device="meta")


def test_weights_are_read_one_at_a_time():
    """No more than one source tensor is alive at any moment."""
    import weakref

    alive: set[int] = set()
    most = 0

    def getter(shape):
        def get():
            nonlocal most
            tensor = torch.randn(shape)
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            most = max(most, len(alive))
            return tensor

        return get

    state = LazyState({f"w{i}.weight": getter((4, 4)) for i in range(12)})
    load_into(module_of({name: torch.zeros(4, 4) for name in state}), state)
    assert most <= 2  # the last one may still be bound while the next is made
    assert not alive


MEASURE = """
import sys, torch
from pathlib import Path
from hooked_mamba.loading import load_checkpoint, load_into
from tests.hooked_mamba.loading.builders import module_of

def peak():  # MB held at most since the last reset, mapped files included
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

for folder, dtype in (arg.split(":") for arg in sys.argv[1:]):
    found = load_checkpoint(folder)
    shapes = {name: torch.empty(found.state_dict[name].shape, device="meta") for name in found.state_dict}
    module = module_of(shapes)
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before = peak()
    load_into(module, found.state_dict, dtype=getattr(torch, dtype))
    print(sum(p.nbytes for p in module.parameters()) / 2**20, peak() - before)
    del found, module
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_near_one_copy(tmp_path):
    """Measured on 188 MB of float32: what loading adds is the weights and the part of a file mapped at a time."""
    cfg = MambaConfig(d_model=768, n_layers=11, d_vocab=10_000)
    state = {name: torch.full(shape, 0.5) for name, shape in weight_shapes(cfg).items()}
    for form in ("hf", "raw"):
        save_checkpoint(tmp_path / form, cfg, state, format=form)
    cases = [f"{tmp_path / 'hf'}:float32", f"{tmp_path / 'raw'}:bfloat16"]
    command = [sys.executable, "-c", MEASURE, *cases]
    root = Path(__file__).parents[3]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        held, added = map(float, line.split())
        largest = max(tensor.nbytes for tensor in state.values()) / 2**20
        assert held > 90
        assert added < held + REMAP_BYTES / 2**20 + 2 * largest, f"{case}: {added:.0f} MB for {held:.0f} MB"
