"""Heads of the case study: in layers of attention, too, what is cut is what the trace says is carried."""

from __future__ import annotations

import pytest
import torch

from circuits import FrozenModel, Logit, attribute
from circuits.interventions import intervened
from demos.hunger import heads
from demos.hunger.options import Options
from demos.hunger.subject import Subject

PROMPT = "Tom ate the red soup. He felt"


@pytest.fixture(scope="module")
def hybrid() -> Subject:
    return Subject.load("tinystories-told-hybrid-4l/write", Options.quick())


@torch.no_grad()
def test_of_mixers_alone_they_are_the_traces_own() -> None:
    subject = Subject.load("tinystories-told-mamba2-4l/write", Options.quick())
    made = attribute(FrozenModel(subject.model, PROMPT), targets=Logit(" hungry", minus=" sad"))
    assert heads.strongest(subject, made, 12) == made.top_heads(12, source="token")
    assert len(heads.units(subject, range(1, 3))) == 2 * 384


@torch.no_grad()
def test_heads_of_attention_are_whole_and_neurons_are_none(hybrid: Subject) -> None:
    made = attribute(FrozenModel(hybrid.model, PROMPT), targets=Logit(" hungry", minus=" sad"))
    found = heads.effects(hybrid, made)
    assert set(found) == {0, 1, "2.attn", 3}
    assert found["2.attn"].shape[1] == 6
    torch.testing.assert_close(found["2.attn"].sum(1), made.token_heads["2.attn"][0].sum(1))
    every = heads.strongest(hybrid, made)
    assert {head[:2] for head in every} == set(heads.units(hybrid, range(4)))
    assert abs(every[0][3]) == max(float(effect.abs().max()) for effect in found.values())
    assert heads.words("2.attn", 3) == "layer 2, attention head 3"
    assert heads.words(1, 8) == "layer 1, channel 8"


@torch.no_grad()
def test_a_cut_takes_away_what_was_carried(hybrid: Subject) -> None:
    """At the site behind it nothing is held: attention's output changes by what the head brought from there."""
    tokens = hybrid.model.to_tokens(PROMPT)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, 4] = True
    site = hybrid.model.act_name("attn_out", 2)
    _, before = hybrid.model.run_with_cache(
        tokens, names_filter=["blocks.2.attn.hook_v", "blocks.2.attn.hook_pattern", site]
    )
    with intervened(hybrid.model, heads.cut("2.attn", 1, mask)):
        _, after = hybrid.model.run_with_cache(tokens, names_filter=[site])
    attention = hybrid.model.block(2).branches["attn"]
    value = before["blocks.2.attn.hook_v"].reshape(1, -1, 2, 32)[0, 4, 0]  # head 1 reads the first of two
    sent = before["blocks.2.attn.hook_pattern"][0, 1, :, 4, None] * value
    wide = torch.zeros(tokens.shape[1], 192)
    wide[:, 32:64] = sent
    torch.testing.assert_close(
        before[site] - after[site], attention.value_output().push(wide)[None], rtol=1e-4, atol=1e-5
    )
