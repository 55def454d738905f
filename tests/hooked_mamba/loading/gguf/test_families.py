"""Every architecture that is read from GGUF: logits are those of the weights that went in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor

from hooked_mamba import HookedRWKV7, load_model
from hooked_mamba.recurrent_config import RWKV7Config
from tests.hooked_mamba.hybrids import tiny
from tests.hooked_mamba.loading.gguf import converted
from tests.hooked_mamba.recurrent import test_deltanet_families as deltanet

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}


def _model(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**(SMALL | fields))
    return tiny.randomize(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def _nemotron(**fields: Any) -> Any:
    return tiny.twin("nemotron", **fields)


def _rwkv7() -> Any:
    ranks = dict.fromkeys(("decay_rank", "rate_rank", "value_rank", "gate_rank"), 6)
    cfg = RWKV7Config(d_model=32, n_layers=3, d_vocab=61, head_dim=8, d_mlp=48, **ranks)
    model = HookedRWKV7(cfg, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def _qwen(case: str) -> Any:
    name, fields = deltanet.CASES[case]
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    everywhere = {"mlp_only_layers": []} if case == "qwen3_next" else {}  # experts, in every layer
    with mock.patch.dict(deltanet.CASES, {case: (name, fields | everywhere)}):
        return deltanet.theirs(case).float()


CASES = {
    "mamba": lambda: _model("Mamba", time_step_rank=5),
    "mamba-bias": lambda: _model("Mamba", time_step_rank=5, use_bias=True, use_conv_bias=False),
    "falcon-mamba": lambda: _model("FalconMamba", time_step_rank=5, tie_word_embeddings=False),
    "mamba2": lambda: _model("Mamba2", num_heads=8, head_dim=8, n_groups=2),
    "jamba": lambda: tiny.twin("jamba"),
    "bamba": lambda: tiny.twin("bamba"),
    "granite-moe": lambda: tiny.twin("granite-moe"),
    "granite-dense": lambda: tiny.twin("granite-dense", position_embedding_type="nope"),
    "nemotron-moe": lambda: _nemotron(layers_block_type=["mamba", "moe", "attention", "moe", "mamba"]),
    "nemotron": lambda: _nemotron(layers_block_type=["mamba", "mlp", "attention", "mlp", "mamba"]),
    "falcon-h1": lambda: tiny.twin("falcon"),
    "falcon-h1-norm": lambda: tiny.twin("falcon-gate-first"),
    "lfm2": lambda: tiny.twin("lfm2"),
    "rwkv7": _rwkv7,
    "qwen3-next": lambda: _qwen("qwen3_next"),
    "qwen3.5": lambda: _qwen("qwen3_5"),
    "qwen3.5-moe": lambda: _qwen("qwen3_5_moe"),
}

FOLDED = ("falcon-h1", "falcon-h1-norm")
"""Families whose factors the converter multiplies into weights: these weights are others, the logits are not."""

PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}
ONE_ULP = 2e-7
"""Of float32: -exp(A_log), and Qwen's 1 + weight, are rounded to it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            place = tmp_path_factory.mktemp(case)
            CASES[case]().save_pretrained(place)
            made[case] = place
        return made[case]

    return folder


def _read(path: Path, case: str) -> Any:
    warned = pytest.warns(UserWarning, match="behind the gate") if case == "falcon-h1-norm" else nullcontext()
    with warned:
        return load_model(path, dtype="float64")


def _logits(model: Any) -> Tensor:
    ids = torch.randint(0, model.cfg.d_vocab, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_source(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    expected = _logits(load_model(folders(case), dtype="float64"))
    found = _logits(_read(converted.convert(folders(case), tmp_path / "model.gguf"), case))
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("kind", [*PLAIN, "Q8_0"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in FOLDED])
def test_weights_are_rounded_once(case: str, kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    weights = dict(load_model(folders(case), dtype="float64").named_parameters())
    read = _read(converted.convert(folders(case), tmp_path / "model.gguf", kind), case)
    for name, weight in read.named_parameters():
        source = weights.pop(name)
        if name.endswith("A_log"):
            torch.testing.assert_close(weight.exp(), source.exp(), rtol=ONE_ULP, atol=0, msg=name)
        elif "norm" in name or "ln_final" in name:
            torch.testing.assert_close(weight, source, rtol=ONE_ULP, atol=0, msg=name)
        elif kind == "Q8_0":  # 127 steps up to the largest of 32; the step itself is rounded to float16
            step = source.abs().max() / 127
            assert bool(((weight - source).abs() <= 0.51 * step + 1e-3 * source.abs()).all()), name
        else:
            assert torch.equal(weight, source) or torch.equal(weight, source.to(PLAIN[kind]).double()), name
    assert not weights
