"""Directories that sparsify itself writes."""

from __future__ import annotations

import pytest
import torch

from saes import SparseCoder

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_we_read_what_it_writes(tmp_path, monkeypatch, transcode, skip, activation):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # read when it is imported
    sparsify = pytest.importorskip("sparsify")
    cfg = sparsify.SparseCoderConfig(
        num_latents=40, k=5, activation=activation, transcode=transcode, skip_connection=skip
    )
    theirs = sparsify.SparseCoder(12, cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3))
    theirs.save_to_disk(tmp_path / "layers.1.mixer")
    back = SparseCoder.load(tmp_path / "layers.1.mixer")
    x = torch.randn(20, 12, generator=generator)
    values, indices, _ = theirs.encode(x)
    z = torch.zeros(20, 40).scatter(1, indices, values)
    assert torch.allclose(back.encode(x), z, rtol=1e-5, atol=1e-6)
    assert torch.allclose(back(x), theirs(x).sae_out, rtol=1e-5, atol=1e-5)
    assert back.cfg.kind == ("mambacoder" if transcode else "sae")
