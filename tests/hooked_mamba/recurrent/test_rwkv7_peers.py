"""RWKV-7 beside the packages that run it: their forward passes from files that were written here.

Each runs in a process of its own, where it may set what it likes.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from hooked_mamba import HookedRWKV7
from hooked_mamba.recurrent_config import RWKV7Config
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.peer

RWKV = """
import os, sys, torch
os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
from rwkv.model import RWKV
folder = sys.argv[1]
tokens = torch.load(folder + "/tokens.pt")
model = RWKV(model=folder + "/raw/model", strategy="cpu fp32")
whole, state = model.forward(tokens, None, full_output=True)
last, stepped = None, None
for token in tokens:
    last, stepped = model.forward(token, stepped)
torch.save({"logits": whole, "last": last, "state": state}, folder + "/theirs.pt")
"""

HF = """
import sys, torch
from rwkv7_hf import RWKV7ForCausalLM
folder = sys.argv[1]
tokens = torch.tensor([torch.load(folder + "/tokens.pt")])
model = RWKV7ForCausalLM.from_pretrained(folder + "/hf", dtype=torch.float32).double()
torch.save({"logits": model(tokens).logits[0].detach()}, folder + "/theirs.pt")
"""


def theirs(code: str, folder) -> dict:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "theirs.pt", weights_only=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model, tokens, folder with its files in both forms)."""
    folder = tmp_path_factory.mktemp("peers")
    ranks = {"decay_rank": 8, "rate_rank": 8, "value_rank": 4, "gate_rank": 12}
    model = HookedRWKV7(RWKV7Config(d_model=128, n_layers=3, d_vocab=64, head_dim=64, d_mlp=160, **ranks), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    tokens = torch.randint(0, 64, (24,), generator=generator).tolist()
    torch.save(tokens, folder / "tokens.pt")
    model.save_pretrained(folder / "raw", format="raw")
    model.save_pretrained(folder / "hf", format="hf")
    return model.eval().requires_grad_(False), torch.tensor([tokens]), folder


@pytest.mark.skipif(importlib.util.find_spec("rwkv") is None, reason="rwkv is not installed")
def test_the_authors_package(case):
    model, tokens, folder = case
    found = theirs(RWKV, folder)
    logits, state = model(tokens, return_state=True)
    assert relative(logits[0], found["logits"]) < 2e-5
    assert relative(logits[0, -1], found["last"]) < 2e-5
    for i, block in enumerate(state):
        shift, S, ffn = (found["state"][3 * i + part] for part in range(3))
        assert relative(block["mixer"].ssm[0], S) < 2e-5
        assert relative(block["mixer"].shift[0], shift) < 2e-5
        assert relative(block["mlp"].shift[0], ffn) < 2e-5


@pytest.mark.skipif(importlib.util.find_spec("rwkv7_hf") is None, reason="rwkv7-hf is not installed")
def test_the_package_for_transformers(case):
    model, tokens, folder = case
    logits = model.double()(tokens)[0]
    model.float()
    assert relative(logits, theirs(HF, folder)["logits"]) < 2e-6  # its decays are float32 always
