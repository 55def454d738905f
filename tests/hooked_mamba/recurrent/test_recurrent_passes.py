"""Chunks, steps, padding and the wrong details of RWKV-7 and gated DeltaNet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mamba import HookedRWKV7
from hooked_mamba.recurrent_config import DeltaNetConfig, RWKV7Config
from tests.hooked_mamba.recurrent.models import KINDS, equations, everything, model_of, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-12

PARTS = {"rwkv7": {"shift": "mixer.shift", "S": "mixer.ssm", "ffn": "mlp.shift"}}
"""The oracle's name of a part of the memory -> the model's."""


def parts(kind: str, block) -> dict[str, torch.Tensor]:
    names = PARTS.get(kind, {"conv": "mixer.conv", "S": "mixer.ssm"})
    held = dict(block.items())
    return {mine: held[theirs] for mine, theirs in names.items()}


def check_memory(kind: str, state, memory, rows=slice(None)) -> None:
    for block, expected in zip(state, memory, strict=True):
        for name, value in parts(kind, block).items():
            if value[rows].numel():
                assert relative(value[rows], expected[name]) < EXACT, name


@pytest.mark.parametrize("lengths", [(3, 4), (1,) * 7, (5, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps_are_one_pass_at_every_site(kind, lengths):
    model, tokens = model_of(kind), tokens_for(length=7, seed=2)
    expected = equations(model, tokens)
    state, start = None, 0
    for length in lengths:
        chunk = slice(start, start + length)
        (logits, state), cache = everything(model, tokens[:, chunk], initial_state=state, return_state=True)
        assert relative(logits, expected.logits[:, chunk]) < EXACT
        for name in model.hook_dict:
            if name != "hook_tokens":
                assert relative(cache[name], expected.sites[name][:, chunk]) < EXACT, name
        start += length
    check_memory(kind, state, expected.memory)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_if_it_were_not_there(kind, side):
    """Every site at the real positions, the memory after them, and what follows from that memory."""
    model, tokens = model_of(kind), tokens_for(length=8, seed=4)
    real = [slice(3, 8), slice(1, 8)] if side == "left" else [slice(0, 5), slice(0, 7)]
    mask = torch.zeros(2, 8, dtype=torch.long)
    for row, where in enumerate(real):
        mask[row, where] = 1
    (logits, state), cache = everything(model, tokens, attention_mask=mask, return_state=True)
    more = tokens_for(length=3, seed=5)
    after = model(more, initial_state=state)
    for row, where in enumerate(real):
        alone = equations(model, tokens[row : row + 1, where])
        assert relative(logits[row, where], alone.logits[0]) < EXACT
        for name in model.hook_dict:
            if name != "hook_tokens":
                assert relative(cache[name][row, where], alone.sites[name][0]) < EXACT, name
        check_memory(kind, state, alone.memory, slice(row, row + 1))
        joined = equations(model, torch.cat([tokens[row : row + 1, where], more[row : row + 1]], 1))
        assert relative(after[row], joined.logits[0, -3:]) < EXACT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_chunk_goes_on_from_a_memory(kind, side):
    model, first, second = model_of(kind), tokens_for(length=4, seed=6), tokens_for(length=6, seed=7)
    _, state = model(first, return_state=True)
    mask = torch.ones(2, 6, dtype=torch.long)
    real = slice(2, 6) if side == "left" else slice(0, 4)
    mask[0] = 0
    mask[0, real] = 1
    logits, state = model(second, initial_state=state, attention_mask=mask, return_state=True)
    joined = equations(model, torch.cat([first[:1], second[:1, real]], 1))
    assert relative(logits[0, real], joined.logits[0, 4:]) < EXACT
    check_memory(kind, state, joined.memory, slice(0, 1))


def test_generation_is_the_argmax_of_the_equations():
    model, tokens = model_of("rwkv7"), tokens_for(rows=1, length=4)
    got = model.generate(tokens, 5, do_sample=False, verbose=False)
    for _ in range(5):
        best = equations(model, tokens).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, torch.from_numpy(best)[:, None]], 1)
    assert torch.equal(got, tokens)


def test_a_pass_that_starts_inside_needs_the_first_value():
    model, tokens = model_of("rwkv7"), tokens_for()
    logits, cache = model.run_with_cache(tokens)
    carry = {"v_first": cache["v_first", 0]}
    assert relative(model(cache["resid_pre", 1], start_at_layer=1, carry=carry), logits) < EXACT
    with pytest.raises(ValueError, match="carry="):
        model(cache["resid_pre", 1], start_at_layer=1)
    with pytest.raises(ValueError, match="layer 0"):
        model(cache["resid_pre", 1], start_at_layer=1, carry={"other": cache["v_first", 0]})


WRONG = {
    "rwkv7": (
        "no ln_embed",
        "mix turned round",
        "v_first dropped",
        "kappa after k's update",
        "kappa unnormalised",
        "kappa on the decayed state",
        "bonus before the norm",
        "eps of heads 1e-5",
    ),
    "deltanet": ("no lengths", "heads tiled", "removal of the undecayed state", "norm 1 + w", "norm after the gate"),
    "deltanet-bare": ("beta not doubled",),
}


@pytest.mark.parametrize(("kind", "wrong"), [(kind, wrong) for kind, names in WRONG.items() for wrong in names])
def test_a_wrong_detail_would_be_noticed(kind, wrong):
    model, tokens = model_of(kind), tokens_for(length=8)
    logits = model(tokens)
    assert relative(logits, equations(model, tokens).logits) < EXACT
    assert relative(logits, equations(model, tokens, wrong=wrong).logits) > 1e-6


def test_decay_is_kept_in_float32():
    model = HookedRWKV7(RWKV7Config(d_model=8, n_layers=1, d_vocab=5, head_dim=4), seed=0).to(torch.bfloat16)
    assert model.blocks[0].mixer.w0.dtype == torch.float32
    tokens = tokens_for(length=4).clamp(max=4)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_w")
    assert cache["blocks.0.mixer.hook_w"].dtype == torch.float32


def test_decays_lie_where_the_paper_says():
    model = model_of("rwkv7")
    _, cache = model.run_with_cache(tokens_for(length=9))
    w = cache["w", 0]
    assert np.exp(-np.exp(-0.5)) < float(w.min())
    assert float(w.max()) < 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"head_dim": 5}, "not a multiple of head_dim=5"), ({"decay_rank": 0}, "decay_rank")],
)
def test_errors_of_rwkv7s_config(fields, match):
    with pytest.raises(ValueError, match=match):
        RWKV7Config(**({"d_model": 8, "n_layers": 1, "d_vocab": 5, "head_dim": 4} | fields))


@pytest.mark.parametrize(
    ("fields", "match"), [({"n_key_heads": 3}, "cannot be shared evenly"), ({"d_conv": -1}, "d_conv must be 0")]
)
def test_errors_of_the_deltanet_config(fields, match):
    usual = {"d_model": 8, "n_layers": 1, "n_key_heads": 2, "n_value_heads": 4, "key_dim": 3, "value_dim": 3}
    with pytest.raises(ValueError, match=match):
        DeltaNetConfig(**(usual | fields))
