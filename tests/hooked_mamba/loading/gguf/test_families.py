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
from tests.hooked_mamba.hybrids import tiny
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


KINDS = (*PLAIN, "Q8_0")


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=[] if number % len(KINDS) == place else pytest.mark.slow)
        for number, case in enumerate(case for case in CASES if case not in FOLDED)
        for place, kind in enumerate(KINDS)
    ],
)
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


def test_factors_where_embeddings_are_one(tmp_path: Path) -> None:
    """One factor of all logits is lost in the file, which is said."""
    model = tiny.twin("falcon", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    expected = _logits(load_model(tmp_path / "source", dtype="float64"))
    path = converted.convert(tmp_path / "source", tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match=r"model\.gguf has no output\.weight: .* embedding_multiplier / lm_head_mult"):
        found = _logits(load_model(path, dtype="float64"))
    factor = model.config.embedding_multiplier / model.config.lm_head_multiplier
    assert abs(factor - 1) > 0.1
    assert float((found - factor * expected).abs().max()) < 1e-6 * float(found.abs().max())


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba of mixers": ("jamba", {"attn_layer_period": 99, "attn_layer_offset": 98}),
    "bamba of mixers": ("bamba", {"attn_layer_indices": []}),
    "granite of mixers": ("granite-moe", {"layers_block_type": ["mamba"] * 2, "num_hidden_layers": 2}),
    "granite of attention": ("granite-moe", {"layers_block_type": ["attention"] * 2, "num_hidden_layers": 2}),
    "lfm2 of convolutions": ("lfm2", {"layer_types": ["conv"] * 2, "num_hidden_layers": 2}),
    "nemotron of mixers": ("nemotron", {"layers_block_type": ["mamba", "mamba"]}),
    "nemotron of mlps": ("nemotron", {"layers_block_type": ["mlp", "mlp"]}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_of_one_kind_are_saved_and_read_again(case: str, tmp_path: Path) -> None:
    """A file says nothing of a branch that no layer has, and transformers' config does."""
    name, fields = LAYERS[case]
    tiny.twin(name, **fields).save_pretrained(tmp_path / "source")
    expected = _logits(load_model(tmp_path / "source", dtype="float64"))
    read = load_model(converted.convert(tmp_path / "source", tmp_path / "model.gguf"), dtype="float64")
    read.save_pretrained(tmp_path / "saved")
    found = _logits(load_model(tmp_path / "saved", dtype="float64"))
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        theirs = read.float().to_hf()(tokens, use_cache=False).logits
    torch.testing.assert_close(theirs, read(tokens), rtol=1e-4, atol=1e-4)
