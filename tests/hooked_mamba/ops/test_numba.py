"""What is special about the numba scan: threads, processes, exp, and versions that do not fit."""

from __future__ import annotations

import multiprocessing
import os
import warnings

import numba
import numpy as np
import pytest
import torch

from hooked_mamba.ops import choose, numba_compile, numba_lanes, selective_scan
from hooked_mamba.ops.selective_scan import _numba_kernels as numba_kernels
from tests.hooked_mamba.ops.cases import outcome, selective_inputs


@pytest.fixture
def many_threads(monkeypatch):
    monkeypatch.setattr(numba_compile, "WORTH_A_THREAD", 1)
    torch.set_num_threads(3)


def test_threads_share_the_channels(many_threads):
    inputs = selective_inputs(3, 70, 50, 5)
    shared = outcome(selective_scan, inputs, torch.float32, "numba", states_at=[3, 69])
    torch.set_num_threads(1)
    alone = outcome(selective_scan, inputs, torch.float32, "numba", states_at=[3, 69])
    assert numba_compile._pool.cache_info().currsize
    for name in shared:
        # Only the sums over channels, dB and dC, are put together in another order.
        if name in ("to B", "to C"):
            assert torch.allclose(shared[name], alone[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(shared[name], alone[name]), name


def _scan_in_child(expected, results):
    inputs = {k: v.float() for k, v in selective_inputs(2, 40, 50, 5).items()}
    results.put(torch.equal(selective_scan(**inputs, backend="numba").y, torch.from_numpy(expected)))


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_other_processes(how, many_threads):
    inputs = {k: v.float() for k, v in selective_inputs(2, 40, 50, 5).items()}
    expected = selective_scan(**inputs, backend="numba").y.numpy()
    context = multiprocessing.get_context(how)
    results = context.Queue()
    child = context.Process(target=_scan_in_child, args=(expected, results))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Newer Pythons warn of any fork with threads.
        child.start()
    assert results.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0


def test_exp2():
    @numba.njit
    def each(values, out):
        for i in range(0, values.size, 16):
            numba_lanes.store(out, i, numba_lanes.exp2(numba_lanes.load(values, i)))

    values = np.concatenate([np.linspace(-125.9, 20, 4000), [0.0, -0.5, 0.5, -1, -127, -1e30, -np.inf, 127]])
    values = values.astype(np.float32)[: 4008 // 16 * 16]
    values[:4] = 0, -np.inf, -1e30, -1
    out = np.empty_like(values)
    each(values, out)
    assert out[0] == 1
    assert out[3] == 0.5
    assert 0 <= out[1] < 1e-37
    assert 0 <= out[2] < 1e-37
    exact = np.exp2(values[4:].astype(np.float64))
    assert np.abs(out[4:] / exact - 1).max() < 2.5e-7


def test_lanes_transpose_and_total():
    @numba.njit
    def both(values, out, sums):
        numba_lanes.transpose(values, 0, 20, out, 0, 16)
        for i in range(16):
            sums[i] = numba_lanes.total(numba_lanes.load(out, 16 * i))

    values = np.arange(16 * 20, dtype=np.float32).reshape(16, 20)
    out, sums = np.zeros((16, 16), np.float32), np.zeros(16, np.float32)
    both(values.reshape(-1), out.reshape(-1), sums)
    assert (out == values[:, :16].T).all()
    assert (sums == values[:, :16].sum(0)).all()


def test_nan_is_not_hidden():
    inputs = {k: v.float() for k, v in selective_inputs(1, 9, 3, 2).items()}
    inputs["dt"][0, 4, 1] = torch.nan
    y = selective_scan(**inputs, backend="numba").y
    assert torch.isfinite(y[:, :4]).all()
    assert torch.isnan(y[0, 4:, 1]).all()
    assert torch.isfinite(y[..., [0, 2]]).all()


def test_a_numba_that_does_not_fit_is_left_out_with_one_warning(monkeypatch):
    def fails(*args):
        raise numba.core.errors.TypingError("no such intrinsic\nand more")

    monkeypatch.setattr(numba_kernels, "forward", fails)
    numba_compile.broken.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"numba scan is left out: .*no such intrinsic\)"):
            assert choose("selective_scan", torch.zeros(1, 2, 3)).name == "torch"
        with pytest.raises(RuntimeError, match=r"numba failed to compile it \(TypingError"):
            choose("selective_scan", torch.zeros(1, 2, 3), backend="numba")
    finally:
        numba_compile.broken.cache_clear()


def test_the_default_type_does_not_matter():
    inputs = {k: v.float() for k, v in selective_inputs(1, 9, 3, 2).items()}
    expected = selective_scan(**inputs, backend="numba").y
    numba_compile.broken.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(selective_scan(**inputs, backend="numba").y, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_kernels_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(numba_compile.sys, "platform", "linux")
    folder = numba_compile._cache_folder()
    assert folder.startswith(str(tmp_path / "hooked_mamba" / "numba-"))
    assert os.path.isdir(folder)


def test_no_place_for_a_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(numba_compile.sys, "platform", "linux")
    assert numba_compile._cache_folder() is None
