"""What is found in pieces is what is found in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hooked_mamba import patching
from saes import evaluate
from saes.explorer import collect
from saes.store import Capture, DataConfig, StoreError, capture_to_disk, rows_of
from saes.store.blocks import ModelBlocks
from saes.store.shared import capture_shared
from tests.saes import many
from tests.saes.models import mambacoder_on, sae_on, tiny


def test_pieces_find_what_one_pass_finds(tmp_path: Path) -> None:
    found = many.everything(tmp_path)
    model, tokens = tiny(), many.text()
    coders = {"sae": sae_on(model, many.SITE), "block": mambacoder_on(model, 0)}
    for i in (0, 7):
        _, cache = model.run_with_cache(tokens[i : i + 1])
        swept = patching.get_act_patch_resid_pre(
            model, tokens[10 + i : 11 + i], cache, lambda logits, i=i: logits[0, -1, int(tokens[i, 0])], progress=False
        )
        assert torch.equal(found["sweep"][i], swept)
    report = evaluate(model, coders, tokens, batch_size=4, progress=False).to_dict()
    mine, theirs = (flat(one) for one in (found["report"], report))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    once = collect(
        model, coders, tokens, n_tokens=300, rows_per_pass=3, context_length=11, top=3, sampled=4, before=3, after=2,
        progress=False,
    )  # fmt: skip
    for name, data in once.items():
        for field in ("n_tokens", "counts", "largest", "histogram", "bin_widths", "top", "promoted", "neighbours"):
            assert many.equal(found[f"{name}/{field}"], getattr(data, field)), (name, field)
        torch.testing.assert_close(found[f"{name}/means"], data.means)
        sampled = found[f"{name}/sampled"]
        held = (sampled.values > 0).sum(1)
        assert torch.equal(held, data.counts.clamp(max=4))  # as many positions as there are, up to four
        for f, n in enumerate(held.tolist()):
            places = sampled.rows[f, :n] * 11 + sampled.positions[f, :n]
            assert len(places.unique()) == n


def flat(value, prefix: str = "") -> dict:
    """Numbers and texts of nested mappings and lists, by their path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{prefix}/{i}").items()}
    return {prefix: value}


def test_a_shared_store_refuses_another_kind_of_store(tmp_path: Path) -> None:
    model, tokens = tiny(), many.text()
    rows = rows_of(tokens, model, DataConfig(context_length=11, epochs=1))
    capture = Capture(model, [many.SITE])
    capture_to_disk(ModelBlocks(capture, rows, tokens=60), tmp_path, 60)
    with pytest.raises(StoreError, match="captured by one process alone"):
        capture_shared(capture, rows, tmp_path, 60, progress=False)
    forever = rows_of(tokens, model, DataConfig(context_length=11))
    with pytest.raises(ValueError, match="never ends"):
        capture_shared(capture, forever, tmp_path / "new", progress=False)
