"""Beam search against transformers', and against full passes; several end tokens."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from hooked_mamba import HookedHybrid, load_model
from tests.hooked_mamba.hybrids.tiny import CASES, tiny, tokens_for, write

pytestmark = pytest.mark.usefixtures("fast")


def upto_an_end(row: Tensor, prompt: int, stops: list[int]) -> list[int]:
    new = row[prompt:].tolist()
    ends = [i for i, token in enumerate(new) if token in stops]
    return new[: ends[0] + 1] if ends else new


@torch.no_grad()
@pytest.mark.parametrize("beams", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("stops", [[], [7, 30], list(range(3, 40))], ids=["no end", "two ends", "many ends"])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("bamba", "falcon", "granite-moe")])
def test_the_tokens_of_transformers(case, stops, beams):
    """Of families whose cached steps are right there; Bamba's positions restart, Falcon-H1 is like Granite."""
    hf, tokens = tiny(case).hf, tokens_for(length=7, seed=3)
    for penalty in (1.0, 0.3):
        expected = hf.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            num_beams=beams,
            eos_token_id=stops or None,
            pad_token_id=0,
            length_penalty=penalty,
        )
        got = HookedHybrid.from_hf(hf).generate(
            tokens,
            6,
            do_sample=False,
            num_beams=beams,
            length_penalty=penalty,
            stop_at_eos=bool(stops),
            eos_token_id=stops,
            verbose=False,
        )
        for mine, theirs in zip(got, expected, strict=True):
            assert upto_an_end(mine, 7, stops) == upto_an_end(theirs, 7, stops)


@torch.no_grad()
@pytest.mark.parametrize("case", ["bamba", "granite-moe", "zamba2"])
def test_beams_go_on_from_their_own_memory(case):
    model, tokens = tiny(case).model, tokens_for(rows=1, length=6)
    texts, scores = tokens, torch.zeros(1, dtype=torch.float64)
    for _ in range(5):
        total = model(texts)[:, -1].log_softmax(-1) + scores[:, None]
        scores, flat = total.flatten().topk(3)
        texts = torch.cat([texts[flat // 61], (flat % 61)[:, None]], 1)
    got = model.generate(tokens, 5, do_sample=False, num_beams=3, stop_at_eos=False, verbose=False)
    assert torch.equal(got, texts[:1])


@torch.no_grad()
def test_rows_of_a_padded_batch_are_searched_as_alone():
    model = tiny("falcon").model
    long = tokens_for(rows=2, length=8, seed=5)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    got = model.generate(long, 4, do_sample=False, num_beams=3, stop_at_eos=False, verbose=False, attention_mask=mask)
    for i, n in enumerate((8, 5)):
        alone = model.generate(long[i : i + 1, :n], 4, do_sample=False, num_beams=3, stop_at_eos=False, verbose=False)
        assert torch.equal(got[i, 8:], alone[0, n:])


def test_beams_with_sampling_are_refused():
    with pytest.raises(ValueError, match="do_sample=False"):
        tiny("falcon").model.generate(tokens_for(length=3), 2, num_beams=2, verbose=False)


@torch.no_grad()
def test_a_config_with_several_end_tokens(tmp_path):
    write(tiny("nemotron").hf, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, *range(20, 61)]}))
    model = load_model(tmp_path)
    assert model.cfg.eos_token_id == (2, *range(20, 61))
    out = model.generate(tokens_for(length=5), 30, do_sample=False, verbose=False)
    assert out.shape[1] < 35
    model.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").cfg.eos_token_id == model.cfg.eos_token_id
