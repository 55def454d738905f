"""Every architecture that is read from GGUF: logits are those of the weights that went in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mamba import load_model
from tests.hooked_mamba.loading.families import CASES
from tests.hooked_mamba.loading.gguf import converted

FOLDED = ("falcon-h1", "falcon-h1-norm")
"""Families whose factors the converter multiplies into weights: these weights are others, the logits are not."""

PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}
ONE_ULP = 2e-7
"""Of float32: -exp(A_log), and Qwen's 1 + weight, are rounded to it."""


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


@pytest.mark.parametrize(
    "case", ["mamba", "falcon-mamba", "mamba2", "jamba", "falcon-h1", "nemotron-moe", "rwkv7", "qwen3.5"]
)
def test_written_as_a_folder_of_transformers(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    read = _read(converted.convert(folders(case), tmp_path / "model.gguf"), case)
    read.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(load_model(tmp_path / "out", dtype="float64")), _logits(read))
