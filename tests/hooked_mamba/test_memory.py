"""What is free, and what the process keeps."""

import subprocess
import sys

import pytest
import torch

from hooked_mamba import memory
from tests.hooked_mamba.tiny import build, tokens_for


def test_the_container_limits_what_is_free(tmp_path, monkeypatch):
    assert memory._of_container(tmp_path) is None  # no such files
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._of_container(tmp_path) == 400
    (tmp_path / "memory.max").write_text("500\n")
    assert memory._of_container(tmp_path) == 0

    monkeypatch.setattr(memory, "_of_machine", lambda: 700)
    monkeypatch.setattr(memory, "_of_container", lambda: 400)
    assert memory.available_bytes(torch.device("cpu")) == 400
    monkeypatch.setattr(memory, "_of_container", lambda: None)
    assert memory.available_bytes(torch.device("cpu")) == 700


@pytest.mark.parametrize("name", ["HOOKED_MAMBA_KEEP_MEMORY", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_has_the_last_word_on_freed_memory(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert memory.keep_freed_memory() is False


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be told")
def test_freed_memory_is_kept_for_the_next_call():
    program = """
import resource, torch
from hooked_mamba.memory import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(2**20) for _ in range(50)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), faults(), faults(), faults(), faults())
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    kept, first, *later = map(int, out.split())
    if kept:  # another C library keeps what it likes
        assert first > 90  # 200 MB in pages of 4 KiB, or of 2 MiB where the system is set so
        assert min(later) < first / 10  # the heap may still grow a little in any one of them


def test_gradients_without_a_filter_leave_the_fused_scan_alone():
    model = build("mamba2")
    tokens = tokens_for(model, rows=1, length=5)
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert "blocks.0.mixer.hook_A_bar" in cache
    assert "blocks.0.mixer.hook_A_bar_grad" not in cache
    assert "blocks.0.mixer.hook_dt_grad" in cache
    named = ["blocks.0.mixer.hook_A_bar", "blocks.0.mixer.hook_dt"]
    _, both = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=named)
    assert both["blocks.0.mixer.hook_A_bar_grad"].shape == both["blocks.0.mixer.hook_A_bar"].shape
    torch.testing.assert_close(both["dt_grad", 0], cache["dt_grad", 0], rtol=1e-4, atol=1e-6)
