"""The studies: all of them at tiny settings, their own arithmetic by other ways, and their pages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from demos.studies import attention, edit, facts, induction, latim, names
from demos.studies.__main__ import STUDIES, main
from demos.studies.common import Options, batch, correlation, single_tokens
from demos.studies.report import Report, Section, Table, layer_map, render
from demos.tour.measure import load
from hooked_mamba import analysis as an
from hooked_mamba.analysis.tasks import Prompts
from tests.demos.test_tour import Tags

TINY = Options(model="tinystories-4l", prompts=4, steps=3, samples=2)


@pytest.fixture(scope="module")
def model():
    return load("tinystories-4l").requires_grad_(False)


@pytest.fixture(scope="module", params=["tinystories-4l", "tinystories-mamba2-4l"])
def either(request):
    return load(request.param).double().requires_grad_(False)


@pytest.fixture(scope="module")
def cases(model):
    return facts.known(model, 3)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs(name, tmp_path, capsys):
    main([name, "--model", TINY.model, "--out", str(tmp_path), "--prompts", "2", "--steps", "2", "--samples", "2"])
    page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    assert str(tmp_path) in capsys.readouterr().out.replace("\n", "")
    found = Tags()
    found.feed(page)
    assert found.addresses == ["data:,"]  # nothing is loaded
    assert found.tags.count("section") >= 3
    assert page.count('class="plot"') >= 1


def test_an_unknown_study_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["attentoin"])
    assert "names, facts" in capsys.readouterr().err


def test_a_name_put_back_where_it_stands_restores_everything(model):
    chosen = next(c for c in names.all_choices(model, 4) if c.task == "he or she")
    _, right, difference = names.judged(model, chosen)
    by_hand = [
        float(model(row[None])[0, -1, r] - model(row[None])[0, -1, w])
        for row, r, w in zip(chosen.clean, chosen.right, chosen.wrong, strict=True)
    ]
    assert difference == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    assert right == sum(d > 0 for d in by_hand) / len(by_hand)
    report = names.run(model, TINY)
    rows = {row[0]: row[1:] for row in report.sections[1].table.rows}
    assert rows["residual stream entering the layer"][0] == "layer 0"
    assert rows["residual stream entering the layer"][2] == "100.0%"


def test_clean_and_corrupted_names_are_each_others_answers(model):
    for choices in names.all_choices(model, 4):
        assert not torch.equal(choices.clean, choices.corrupted)
        words = model.to_str_tokens(choices.clean[0])
        if choices.task == "the other name":
            assert words.count(model.to_single_str_token(int(choices.wrong[0]))) == 2
            assert words.count(model.to_single_str_token(int(choices.right[0]))) == 1


def test_cutting_all_later_positions_is_one_knockout_a_token(model, cases):
    case = cases[0]
    together = facts.to_all_later(model, case, [1, 2])
    base = float(case.difference(model(case.tokens)))
    for t in (2, 4, len(case.words) - 1):
        with an.knockout(model, t, range(t + 1, len(case.words)), [1, 2]):
            alone = float(case.difference(model(case.tokens))) - base
        assert float(together[t]) == pytest.approx(alone, abs=1e-4)


def test_known_prompts_are_continued_as_expected(model, cases):
    expected = {prompt: answer for prompt, answer, _, _ in facts.PROMPTS}
    assert 1 <= len(cases) <= 3
    for case in cases:
        assert model.to_single_str_token(int(model(case.prompt)[0, -1].argmax())) == expected[case.prompt]


def test_latim_takes_silu_as_additive(either):
    """Against the sum over taps, positions and channels, one by one."""
    tokens = either.to_tokens("I like to eat toast")
    _, cache = either.run_with_cache(tokens)
    layer, l = 1, tokens.shape[1]
    mixer = either.blocks[layer].mixer
    E, taps = either.cfg.E, mixer.conv1d.weight[:, 0]
    alpha = cache.scan_view(layer).rows([l - 1])[0, :, 0].repeat_interleave(cache.scan_view(layer).u.shape[3], 0)
    sent = torch.zeros(l, E, dtype=torch.double)
    for j in range(l):
        for s in range(j, min(l, j + taps.shape[1])):
            value = taps[:E, taps.shape[1] - 1 - (s - j)] * cache["x_pre", layer][0, j, :E]
            sent[j] += alpha[:, s] * value * torch.sigmoid(value)
    expected = (sent * cache.output_gain(layer)[0, -1]) @ mixer.out_proj.weight.t()
    torch.testing.assert_close(latim.latim_parts(cache, layer), expected)


def test_exact_parts_sum_to_the_output_and_latims_do_not(either):
    _, cache = either.run_with_cache(either.to_tokens("I like to eat toast"))
    for layer in range(either.cfg.n_layers):
        parts, constant = latim.exact_parts(cache, layer)
        whole = cache["out_proj", layer][0, -1]
        torch.testing.assert_close(parts.sum(0) + constant, whole)
        assert float((latim.latim_parts(cache, layer).sum(0) - whole).norm() / whole.norm()) > 0.05


def test_alti_is_what_the_length_loses():
    parts = torch.tensor([[3.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    whole = parts.sum(0)  # (2, -1), of length 3; without each part: 2, 2 and 4
    assert latim.alti(parts, whole).tolist() == pytest.approx([0.5, 0.5, 0])


def test_interventions_on_taps_and_memory_leave_the_model_as_it_was(either):
    tokens = either.to_tokens("Once upon a time there was a cat")
    before, weight = either(tokens), either.blocks[1].mixer.conv1d.weight.clone()
    K = weight.shape[-1]
    with induction.without_taps(either, 1, range(1, K)):
        _, cache = either.run_with_cache(tokens)
        own = cache["x_pre", 1] * weight[:, 0, -1] + either.blocks[1].mixer.conv1d.bias
        torch.testing.assert_close(cache["conv", 1], own)
    with induction.without_memory(either, 1):
        _, cache = either.run_with_cache(tokens, names_filter=["*hook_h", "*hook_Bx"])
        torch.testing.assert_close(cache["h", 1], cache["Bx", 1])
        assert not torch.equal(cache["h", 0], cache["Bx", 0])
    assert torch.equal(either.blocks[1].mixer.conv1d.weight, weight)
    assert torch.equal(either(tokens), before)


def test_right_answers_of_both_kinds_of_questions(model):
    questions = induction.questions_for(model, TINY)
    where = questions.prompts.where
    assert questions.prompts.tokens.gather(1, where[:, None])[:, 0].tolist() == questions.prompts.answers.tolist()
    logits = torch.zeros(len(where), 1, model.cfg.d_vocab)
    logits[:, 0, questions.prompts.answers] = torch.eye(len(where))
    logits[:, 0, questions.prompts.answers[0]] += 100  # a favourite is no answer
    assert questions.right(logits).all()
    assert not questions.right(logits.roll(1, 0)).any()


def test_where_is_it_looked_up_finds_the_position_that_is_read(model):
    """A model stands in for itself: only cutting the position that a fake answer depends on changes what is right."""
    tokens = batch(model, ["Tim had a ball. Tim loved his"] * 2)
    prompts = Prompts(tokens, torch.tensor([1, 1]), torch.tensor([3, 3]))
    with an.knockout(model, 3, -1, 0, source="scan"):
        cut = model(tokens)[:, -1]
    whole = model(tokens)[:, -1]
    questions = induction.Questions(prompts, "", lambda logits: (logits[:, -1] - whole).abs().amax(-1) < 1e-6, 0.5)
    section = induction.positions_section(model, questions, 1.0)
    assert (cut - whole).abs().max() > 1e-4
    assert {row[0]: row[1] for row in section.table.rows}["the answer"] == "0.0%"


def test_the_edit_does_what_it_says(model):
    report = edit.run(model, replace(TINY, steps=12, prompts=3))
    rows = report.sections[1].table.rows
    before, after = float(rows[0][2][:-1]), float(rows[0][5][:-1])
    assert after > 3 * before
    assert all(rate.endswith("%") for row in rows for rate in (row[1], row[4]))
    assert edit.span([1, 2, 3, 2, 3, 4], [2, 3, 4]) == [3, 4, 5]
    with pytest.raises(ValueError, match="do not stand"):
        edit.span([1, 2], [3])


def test_direct_effects_are_those_of_the_decomposition(model, cases):
    _, cache = model.run_with_cache(cases[0].tokens)
    onto = (model.W_U[:, cases[0].answer] - model.W_U[:, cases[0].other]) * model.ln_final.weight
    expected = (cache.stack_source_results(2, "token", pos_slice=-1) @ onto)[:-1, 0].abs()
    torch.testing.assert_close(attention.direct(cache, 2, cases[0], "token")[0], expected, rtol=1e-3, atol=1e-5)


def test_a_model_that_knows_nothing_says_so(model):
    silent = load("tinystories-4l")
    with torch.no_grad():
        silent.embed.weight.zero_()
        for run in (facts.run, attention.run, latim.run, edit.run):
            report = run(silent, TINY)
            assert "NaN" not in render(report).split("<script")[0]
    assert "0 are continued as expected" in facts.run(silent, TINY).sections[0].text


def test_texts_of_a_report_are_escaped():
    evil = "<script>alert(1)</script>"
    plot = layer_map(torch.zeros(1, 2), [evil, "b"], "legend", rows=[evil])
    section = Section(evil, evil, Table([evil], [[evil]]), [plot], evil)
    page = render(Report("x", evil, evil, evil, evil, [section]))
    assert "alert(1)</script>" not in page


def test_words_of_one_token(model):
    found = single_tokens(model, ["Tom", "Nebuchadnezzar"])
    assert list(found) == ["Tom"]
    assert model.to_single_str_token(found["Tom"]) == " Tom"
    with pytest.raises(ValueError, match="length"):
        batch(model, ["a cat", "a cat and a dog"])


def test_correlation():
    a = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(a, 5 - 2 * a) == pytest.approx(-1)
    assert math.isnan(correlation(a, torch.ones(3)))
