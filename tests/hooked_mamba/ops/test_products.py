"""Linear layers: oneDNN and torch's own product give the same values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from hooked_mamba.ops import products


@pytest.fixture
def always(monkeypatch):
    """oneDNN however small the product."""
    monkeypatch.setattr(products, "SMALL", 0)
    if not products._by_onednn(torch.zeros(1, 1, 1), torch.zeros(1, 1)):
        pytest.skip("this build of torch has no oneDNN")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 4, 9), (3, 33, 96, 130), (1, 1, 1, 1)])
def test_values_and_gradients(always, shape, with_bias):
    b, l, i, o = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, weight, bias, dy = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((b, l, i), (o, i), (o,), (b, l, o))
    )
    results = []
    for dtype, product in ((torch.float64, F.linear), (torch.float32, products.linear)):
        inputs = [t.to(dtype).requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
        out = product(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, dy.to(dtype))])
    for exact, mine in zip(*results, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others(always):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 40, 64, generator=generator), torch.randn(96, 64, generator=generator)
    whole = products.linear(x, weight)
    changed = x.clone()
    changed[:, 20:] = 0
    assert torch.equal(products.linear(changed, weight)[:, :20], whole[:, :20])


def test_inputs_in_any_layout(always):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 64, 40, generator=generator).transpose(1, 2)
    weight = torch.randn(64, 96, generator=generator).t()
    torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_only_where_it_fits(always):
    x, weight = torch.ones(1, 2, 3), torch.ones(4, 3)
    assert not products._by_onednn(x.double(), weight.double())
    assert not products._by_onednn(x.bfloat16(), weight.bfloat16())
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not products._by_onednn(x, weight)
    assert torch.equal(products.linear(x.double(), weight.double()), torch.full((1, 2, 4), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 200])
def test_a_single_row_by_numba(width, threads, monkeypatch):
    from hooked_mamba.ops import numba_compile, numba_row

    monkeypatch.setattr(numba_compile, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(width)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((1, 1, width), (37, width), (37,)))
    weight.requires_grad_()
    for b in (None, bias):
        with torch.no_grad():
            out = products.linear(x, weight, b)
            assert torch.equal(out, numba_row.row_times(x, weight, b))
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        scale = (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(products.root_mean_square(x, 1e-5).double(), scale, rtol=1e-6, atol=0)
    assert products.linear(x, weight).requires_grad  # with a gradient in view, torch's own product
