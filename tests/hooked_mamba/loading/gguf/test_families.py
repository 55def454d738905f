"""Every architecture that is read from GGUF: logits are those of the weights that went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hooked_mamba import load_model
from tests.hooked_mamba.hybrids.tiny import randomize
from tests.hooked_mamba.loading.gguf import written

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}


def _model(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**(SMALL | fields))
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config).eval())


CASES = {
    "mamba": lambda: _model("Mamba", time_step_rank=5),
    "mamba-bias": lambda: _model("Mamba", time_step_rank=5, use_bias=True, use_conv_bias=False),
    "falcon-mamba": lambda: _model("FalconMamba", time_step_rank=5, tie_word_embeddings=False),
    "mamba2": lambda: _model("Mamba2", num_heads=8, head_dim=8, n_groups=2),
}

FOLDED: tuple[str, ...] = ()
"""Families whose factors the converter multiplies into weights: these weights are others, the logits are not."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = {"F32": 1e-6, "F16": 3e-3, "BF16": 3e-2, "Q8_0": 5e-2}
"""Largest change of the logits, as a share of their size; in F32 only -exp(A_log) is rounded."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in CASES.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name])
    return made


@pytest.mark.parametrize("kind", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_weights(case: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ours = load_model(folders[case], dtype="float64")
    read = load_model(written.convert(folders[case], tmp_path / "model.gguf", kind), dtype="float64")
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(ids), read(ids)
    assert float((found - expected).abs().max()) <= ROUNDING[kind] * float(expected.abs().max())
    if kind not in PLAIN or case in FOLDED:
        return
    weights = dict(ours.named_parameters())
    for name, weight in read.named_parameters():
        if name.endswith("A_log"):
            torch.testing.assert_close(weight.exp(), weights[name].exp(), rtol=2e-7, atol=0)
        else:
            rounded = weights[name].to(PLAIN[kind]).double()
            assert torch.equal(weight, weights[name]) or torch.equal(weight, rounded), name
    with torch.no_grad():  # of exactly these weights
        for name, weight in read.named_parameters():
            weights[name].copy_(weight)
        torch.testing.assert_close(found, ours(ids), rtol=1e-12, atol=1e-12)
