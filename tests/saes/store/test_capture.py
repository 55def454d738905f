"""One pass of the model for many sites and layers, at the positions that count."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig
from hooked_mamba.model_hash import model_hash
from saes.store import Capture, Rows


def mamba() -> HookedMamba:
    return HookedMamba(MambaConfig(d_model=8, n_layers=3, d_vocab=17, d_state=3), seed=0)


def rows(batch: int = 3, length: int = 7) -> Rows:
    tokens = torch.randint(1, 17, (batch, length), generator=torch.Generator().manual_seed(0))
    return Rows(tokens, torch.ones(batch, length, dtype=torch.bool))


STREAMS = ["blocks.0.norm.hook_out", "blocks.0.mixer.hook_out_proj", "blocks.1.mixer.hook_dt", "hook_embed"]


def test_one_pass_gives_all_streams_and_runs_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mamba()
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        original = block.forward
        monkeypatch.setattr(block, "forward", lambda *args, i=i, original=original: ran.append(i) or original(*args))
    values = Capture(model, STREAMS)(rows())
    assert ran == [0, 1]
    assert {name: list(value.shape) for name, value in values.items()} == {
        "blocks.0.norm.hook_out": [21, 8],
        "blocks.0.mixer.hook_out_proj": [21, 8],
        "blocks.1.mixer.hook_dt": [21, 16],
        "hook_embed": [21, 8],
    }
    _, cache = model.run_with_cache(rows().tokens)
    for name, value in values.items():
        torch.testing.assert_close(value, cache[name].flatten(0, 1).float())


def test_all_layers_run_where_the_final_norm_is_wanted() -> None:
    model = mamba()
    values = Capture(model, ["ln_final.hook_out"])(rows())
    _, cache = model.run_with_cache(rows().tokens)
    torch.testing.assert_close(values["ln_final.hook_out"], cache["ln_final.hook_out"].flatten(0, 1))


def test_padding_and_excluded_tokens_are_left_out() -> None:
    model = mamba()
    tokens, real, _ = rows()
    real = real.clone()
    real[1, 4:] = False
    tokens = tokens.clone()
    tokens[:, 0] = 0
    values = Capture(model, STREAMS, exclude_tokens=[0])(Rows(tokens, real))
    assert len(values["hook_embed"]) == 21 - 3 - 3
    alone = Capture(model, STREAMS)(Rows(tokens[1:2, :4], real[1:2, :4]))
    for name, value in values.items():
        torch.testing.assert_close(value[6:9], alone[name][1:4], rtol=1e-5, atol=1e-6)


def test_large_sites_at_some_positions_and_channels() -> None:
    model = mamba()
    site = "blocks.1.mixer.hook_h"
    capture = Capture(model, [site, "hook_embed"], positions_per_row=2, channels={site: [5, 0]})
    assert capture.widths == {site: 6, "hook_embed": 8}
    values = capture(rows(), torch.Generator().manual_seed(3))
    chosen = torch.randperm(7, generator=torch.Generator().manual_seed(3))[:2].sort().values
    _, cache = model.run_with_cache(rows().tokens, names_filter=[site, "hook_embed"])
    expected = cache[site][:, chosen][:, :, [5, 0]].reshape(6, 6)
    torch.testing.assert_close(values[site], expected)
    torch.testing.assert_close(values["hook_embed"], cache["hook_embed"][:, chosen].reshape(6, 8))


def test_mamba2_sites_are_flattened() -> None:
    model = HookedMamba2(Mamba2Config(d_model=8, n_layers=1, d_vocab=17, d_state=4, head_dim=4), seed=0)
    streams = ["blocks.0.mixer.hook_x", "blocks.0.mixer.hook_B", "blocks.0.mixer.hook_out_proj@local"]
    capture = Capture(model, streams, dtype=torch.bfloat16)
    values = capture(rows())
    assert {name: v.shape[1] for name, v in values.items()} == capture.widths
    assert capture.widths == dict(zip(streams, [16, 4, 8], strict=True))
    assert {v.dtype for v in values.values()} == {torch.bfloat16}


def test_what_is_kept_does_not_hold_the_models_memory() -> None:
    value = Capture(mamba(), ["blocks.0.norm.hook_out"])(rows())["blocks.0.norm.hook_out"]
    assert value.untyped_storage().nbytes() == value.numel() * 4
    assert not value.requires_grad
    assert not value.is_inference()


def test_errors() -> None:
    model = mamba()
    with pytest.raises(ValueError, match="no streams"):
        Capture(model, [])
    with pytest.raises(ValueError, match="positions_per_row"):
        Capture(model, STREAMS, positions_per_row=0)
    with pytest.raises(ValueError, match="not captured"):
        Capture(model, STREAMS, channels={"blocks.0.mixer.hook_h": [0]})
    with pytest.raises(IndexError, match=r"channel 16 of blocks\.0\.mixer\.hook_h is out of range"):
        Capture(model, ["blocks.0.mixer.hook_h"], channels={"blocks.0.mixer.hook_h": [16]})
    model.blocks[0].norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.norm\.hook_out holds NaN"):
        Capture(model, ["blocks.0.norm.hook_out"])(rows())


def test_model_hash_is_of_the_values() -> None:
    model = mamba()
    first = model_hash(model)
    assert len(first) == 16
    assert first == model_hash(mamba())
    half = model.bfloat16()
    assert model_hash(half) == model_hash(half.float())
    model.blocks[0].norm.weight.data[0] += 1
    assert model_hash(model) != first
