"""On models compiled by hand: attribution names the known source, channel and embedding, `patch_effects` the marker."""

from __future__ import annotations

import pytest

from circuits import FrozenModel, Logit, attribute, patch_effects
from tests.circuits.compiled_models import (
    INDUCTION_TOKENS,
    VALUES,
    Case,
    Compiled,
    echo,
    echo_cases,
    induction,
    induction_cases,
    latch,
    latch_cases,
)
from tests.kinds import MAMBA

FORMS = {"plain": {}, "distractors": {"distractors": True}, "turned": {"distractors": True, "turned": True}}


def check(compiled: Compiled, case: Case, filler: int, layer: int, unread: bool = True) -> None:
    """`unread`: no distractor reads the tokens that choose, so that nothing at all comes from their embeddings."""
    frozen = FrozenModel(compiled.model, case.tokens)
    assert int(frozen.logits[0, -1].argmax()) == case.answer, "the model does not do its task"
    target = Logit(case.answer, minus=case.other)
    found = attribute(frozen, targets=target)
    assert found.residual.abs().max() < 1e-10
    assert int(found.embeddings[0].argmax()) == case.value_at
    channel = compiled.channel_of[case.answer]
    assert found.top_heads(1, source="scan")[0][:3] == (layer, channel, case.scan_at)
    assert found.top_heads(1, source="token")[0][:3] == (layer, channel, case.value_at)
    effects = patch_effects(frozen, target=target, replace_by=filler)
    # Where the replaced run's gated norm had nothing to divide by, terms of the reverse order are large and cancel.
    sizes = 1 + effects.reverse.value.abs() + effects.reverse.gates.abs()
    assert (effects.residual / sizes).max() < 1e-12
    for at in case.chosen_by:
        assert abs(float(found.embeddings[0, at])) < (1e-10 if unread else 0.5) * float(found.target[0])
        assert float(effects.forward.selection[at]) > 0.5 * float(found.target[0])
    strongest = effects.forward.selection.topk(len(case.chosen_by)).indices
    assert sorted(strongest.tolist()) == case.chosen_by


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("via", ["marker", "value"])
@pytest.mark.parametrize("family", MAMBA)
def test_latch(family, via, form):
    compiled = latch(family, via, 0, **FORMS[form])
    for case in latch_cases(2, via, 0):
        check(compiled, case, filler=VALUES, layer=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("via", ["marker", "value"])
@pytest.mark.parametrize("family", MAMBA)
def test_latch_on_many_models(family, via, form):
    for seed in range(1, 11):
        compiled = latch(family, via, seed, **FORMS[form])
        for case in latch_cases(10, via, seed):
            check(compiled, case, filler=VALUES, layer=0)


@pytest.mark.parametrize("via", ["scan", "skip"])
@pytest.mark.parametrize("family", MAMBA)
def test_echo(family, via):
    for seed in range(5):
        compiled = echo(family, via, seed)
        for case in echo_cases(3, seed):
            check(compiled, case, filler=VALUES, layer=0)


def check_induction(family: str, form: str, seed: int, cases: int) -> None:
    compiled = induction(family, seed, **FORMS[form])
    for case in induction_cases(cases, seed):
        filler = next(token for token in range(INDUCTION_TOKENS) if token not in (case.answer, case.other))
        check(compiled, case, filler, layer=1, unread=form == "plain")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAMBA)
def test_induction(family, form):
    for seed in range(2):
        check_induction(family, form, seed, cases=2)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAMBA)
def test_induction_on_many_models(family, form):
    for seed in range(2, 12):
        check_induction(family, form, seed, cases=10)
