"""Fresh memory for large results, and how much a scan takes beyond its inputs."""

from __future__ import annotations

import gc
import resource
import sys

import pytest
import torch

from hooked_mamba.ops import memory, selective_scan
from hooked_mamba.ops.memory import fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (5, memory.LARGE // 16)])
def test_a_tensor_like_any_other(shape, dtype):
    like = torch.zeros(1, dtype=dtype)
    tensor = fresh(like, *shape)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    tensor.fill_(3)
    assert (tensor == 3).all()


def test_large_memory_is_given_back():
    if sys.platform != "linux":
        pytest.skip("reads /proc")

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = resident()
    tensor = fresh(torch.zeros(1), 64 << 18).fill_(1)
    assert resident() - before > 60 << 20
    view = tensor[5:]
    del tensor
    assert view[0] == 1
    del view
    gc.collect()
    assert resident() - before < 16 << 20


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_no_tensor_of_all_states_is_formed(backend):
    b, l, E, N = 1, 512, 256, 16
    inputs = torch.rand(2, b, l, E)
    A, B, D = -torch.rand(E, N), torch.rand(b, l, N), torch.rand(E)
    largest = 0
    original = torch.Tensor.new_empty

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        selective_scan(*inputs, A, B, B, D, backend=backend)
    assert torch.Tensor.new_empty is original
    assert largest < b * l * E * N * 4 / 2
