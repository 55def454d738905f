"""The case study: its sentences, its statistics by other ways, its stages and its page."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess

import pytest
import torch

from circuits.graph import Graph, Node
from demos.dictionaries.text import MIXES
from demos.hunger import ablation, cutting, geometry, natural, planted, run, selection, stats, steering
from demos.hunger.__main__ import main, measured, write
from demos.hunger.activation import as_long
from demos.hunger.claims import AUC, judge
from demos.hunger.concepts import CONCEPTS, END, HUNGRY, Pair
from demos.hunger.options import Options, parse_args
from demos.hunger.page import TEMPLATE as PAGE
from demos.hunger.page import group, headline
from demos.hunger.planted_claims import judge_planted
from demos.hunger.stages import Stages, rounded
from demos.hunger.subject import Sentences, Subject
from demos.studies.report import Report, Section, Table, render
from demos.tinystories.grammar import tell_stories
from demos.tinystories.leads import lead_area
from hooked_mamba import load_model
from tests.demos.test_tour import Tags

MODEL = "tinystories-4l"
TINY = {
    "words": 2, "told": 4, "stories": 3, "story_tokens": 12, "shortlist": 2, "controls": 3, "generations": 3,
    "new_tokens": 3, "heads": 2, "resamples": 20, "nearest": 20,
}  # fmt: skip


def outcome(**failed: str) -> dict:
    """Results of models by name, with claims that fail."""

    def claims(names: str) -> list[dict]:
        return [{"name": name, "holds": name not in names.split()} for name in ("reads", "says", "steers", "circuit")]

    return {"models": {m: {"concepts": {HUNGRY.name: {"claims": claims(names)}}} for m, names in failed.items()}}


def test_the_headline_says_which_claims_fail_where() -> None:
    assert headline(outcome(a="circuit", b="")) == "A latent passes for hunger on a and b."
    assert headline(outcome(a="reads")) == "No latent passes for hunger. “reads” fails on a."
    three = outcome(a="reads says", b="reads", c="reads steers says circuit")
    said = "“reads” fails on all; “says” fails on a and c; “steers” fails on c."
    assert headline(three) == f"No latent passes for hunger. {said}"
    both = headline(outcome(a="reads says steers", b="steers says reads"))
    assert both == "No latent passes for hunger. “reads”, “says” and “steers” fail on all."
    some = headline(outcome(a="circuit", b="says", c="says", d="says"))
    assert some == "A latent passes for hunger on a alone. “says” fails on b, c and d."


@pytest.fixture(scope="module")
def subject():
    return Subject.load(MODEL, Options(**TINY))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny run of one model about hunger alone, whatever comes of it, and its folder."""
    out = tmp_path_factory.mktemp("hunger")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ESSENTIAL", ())
        results = measured([MODEL], Options(**TINY), out)
        write(results, out)
    return results, out


# Sentences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda c: c.name)
def test_halves_share_neither_frame_nor_word(concept):
    find, score = concept.find, concept.score
    assert not {f for pair in find.frames for f in pair} & {f for pair in score.frames for f in pair}
    assert not {*find.cues, *find.others} & {*score.cues, *score.others}
    assert len(concept.pairs("find")) + len(concept.pairs("score")) >= 50
    for half in (find, score):
        assert len(half.cues) == len(half.others) == len({*half.cues})
        assert half.cues == half.others or not {*half.cues} & {*half.others}
        assert all(frame.count("{}") == 1 for pair in half.frames for frame in pair)


def test_sentences_without_a_cue_hold_no_food():
    foods = {*HUNGRY.find.cues, *HUNGRY.score.cues, *HUNGRY.lexicon}
    for half in ("find", "score"):
        for pair in HUNGRY.pairs(half):
            assert not foods & {*re.findall(r"\w+", pair.other)}
            assert foods & {*re.findall(r"\w+", pair.cue)}
            assert pair.cue.endswith(END)
            assert pair.other.endswith(END)
            assert pair.cue not in (pair.other, pair.swapped, pair.replaced)


def test_the_study_is_about_the_published_prompt():
    assert HUNGRY.prompt == "I like to eat toast for breakfast. I'm so"
    assert (HUNGRY.word, HUNGRY.against) == (" hungry", " sad")


def test_no_frame_is_in_the_grammar():
    assert planted.frames_in(tell_stories(700, 0)) == []
    assert planted.frames_in(["Tim said.\nlook at the old cheese near the door. I am"]) == [
        "Look at the {} near the door."
    ]


@pytest.mark.slow
def test_no_frame_is_in_any_story_that_the_models_were_told():
    found = planted.measure(MODEL, 8000)
    assert found["stories"] == 8000
    assert found["frames"] == []
    assert found["effects"]["hungry"]["of_mix"] == pytest.approx(0.15 * 0.01712, rel=0.01)  # the model card's figure


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MIXES if "told" in name])
def test_no_frame_is_in_any_story_that_tells_by_a_noun(name):
    found = planted.measure(name, 10**6)
    assert found["stories"] == MIXES[name].stories + MIXES[name].cues
    assert found["frames"] == []


@pytest.mark.parametrize("name", [name for name in MIXES if "told" in name])
def test_models_that_know_the_story(name):
    """On sentences of neither half's frames was any of them trained; the other model of the same text does not know."""
    areas = [lead_area(load_model(name), HUNGRY, half) for half in ("find", "score")]
    assert min(areas) >= 0.95
    assert lead_area(load_model("tinystories-4l"), HUNGRY, "score") < 0.7


def test_nothing_was_planted_in_the_model_of_real_text():
    assert planted.measure("tinystories-4l-real", 8000)["share_of_rows"] == 0


def test_where_two_sentences_differ():
    pair = Pair("", "", "", "", 0, 0)
    assert pair.differing([1, 2, 3, 4], [1, 9, 4]) == range(1, 3)
    assert pair.differing([1, 1, 1], [1, 1]) == range(2, 3)
    assert pair.differing([5], [5]) == range(1, 1)


def test_the_cue_is_found_in_every_sentence(subject):
    sentences, mask = ablation.cue_mask(subject, HUNGRY)
    for i, pair in enumerate(HUNGRY.pairs("score", subject.options.words)):
        said = subject.model.to_string(sentences.tokens[i][mask[i]]).strip()
        assert said == HUNGRY.score.cues[pair.word]
        assert subject.model.to_string(torch.tensor(sentences.row(i))) == pair.cue


# Statistics --------------------------------------------------------------------------------------------------------


def test_area_under_the_curve_against_counting():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randint(0, 4, (n, 3), generator=generator) for n in (7, 5))
    for f in range(3):
        wins = sum((p > n) + (p == n) / 2 for p in positive[:, f].tolist() for n in negative[:, f].tolist())
        assert float(stats.auc(positive, negative)[f]) == pytest.approx(wins / 35)
    assert float(stats.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))) == 1


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    held = 0
    for seed in range(200):
        found = stats.mean_interval(torch.randn(60, generator=generator), 400, seed)
        held += found["low"] <= 0 <= found["high"]
    assert 0.88 <= held / 200 <= 0.99
    values = torch.tensor([0.0, 1.0, 5.0])
    by_index = stats.bootstrap(lambda chosen: values[chosen].mean(), 3, 50, seed=4)
    assert by_index == pytest.approx(stats.mean_interval(values, 50, seed=4), abs=1e-6)


def test_a_value_beside_its_controls():
    found = stats.beside(2.0, torch.arange(101) / 50)
    assert found["low"] == pytest.approx(0.05)
    assert found["high"] == pytest.approx(1.95)
    assert (found["reach"], found["controls"]) == (1, 101)


def test_controls_are_like_the_latent_but_not_the_latent():
    share = [0.0, 0.5, 0.1, 0.11, 0.09, 0.1, 0.001, 0.12]
    found = {"tokens": 1000, "coders": {"a": {"share": share, "largest": [1.0] * 8}}}
    assert natural.matched(found, "a", 2, 1, seed=0)[0] in (3, 4, 5, 7)
    chosen = natural.matched(found, "a", 2, 5, seed=0)
    assert 2 not in chosen
    assert 0 not in chosen  # never active
    assert chosen == natural.matched(found, "a", 2, 5, seed=0)


def test_controls_are_as_long_as_the_latent(subject):
    coder = subject.coders["l2-mambacoder"]
    found = {"coder": "l2-mambacoder", "layer": 2, "feature": 3, "maximum": 1.7}
    assert as_long(subject, found, 3) == pytest.approx(1.7)
    lengths = [as_long(subject, found, f) * float(coder.W_dec[f].norm()) for f in (3, 50, 700)]
    assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-5)


def test_the_best_token_is_the_best_token(subject):
    cues, others = (
        Sentences.of(subject.model, texts) for texts in (["a cat ran", "a cat sat"], ["a dog ran", "a cow sat"])
    )
    found = selection.best_token(cues, others)
    assert subject.model.to_single_str_token(found["token"]) == " cat"
    assert (found["sign"], found["auc"]) == (1, 1.0)


def test_ranks_count_tokens_that_are_nearer():
    assert geometry.ranks(torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]]), 2) == [2, 2]


def test_three_dimensions_keep_what_varies_most():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 3, 2, 0.1, 0.1, 0.1])
    found = geometry.embed(x, "pca", 0)
    wanted = torch.linalg.svdvals(x - x.mean(0))[:3]
    torch.testing.assert_close(found.norm(dim=0), wanted)


def test_surprise_is_that_of_each_story_alone(subject):
    starts = Sentences.of(subject.model, ["One day", "The cat sat on the mat"])
    new = torch.tensor([[700, 701, 702], [703, subject.model.eos_token_id, 9]])
    real = torch.tensor([[True, True, True], [True, False, False]])
    found = steering.surprise(subject, starts, new, real)
    for i in range(2):
        ids = torch.tensor([starts.row(i) + new[i][real[i]].tolist()])
        losses = subject.model(ids, return_type="loss", loss_per_token=True)[0, len(starts.row(i)) - 1 :]
        assert float(found[i]) == pytest.approx(float(losses.mean()), abs=1e-4)


# Stages and claims -------------------------------------------------------------------------------------------------


def test_stages_are_measured_once(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"x": 1 / 3, "y": float("inf")}

    first = Stages(tmp_path, {"seed": 0}).run("one", measure)
    before = (tmp_path / "one.json").read_bytes()
    assert Stages(tmp_path, {"seed": 0}).run("one", measure) == first == {"x": 0.333333, "y": None}
    assert ((tmp_path / "one.json").read_bytes(), len(calls)) == (before, 1)
    Stages(tmp_path, {"seed": 1}).run("one", measure)
    assert len(calls) == 2
    (tmp_path / "one.json").write_text("{", encoding="utf-8")
    Stages(tmp_path, {"seed": 1}).run("one", measure)
    Stages(tmp_path, {"seed": 1}).run("one", measure, beside=[tmp_path / "gone"])
    assert len(calls) == 4
    assert rounded({"a": [1234567.0, True, None]}) == {"a": [1234570.0, True, None]}


def test_a_stopped_run_goes_on_and_gives_the_same(tiny, subject, monkeypatch, tmp_path):
    results, out = tiny
    shutil.copytree(out, tmp_path / "out")
    study = tmp_path / "out" / MODEL / "hungry"
    for name in ("steering", "swap"):  # as if it had been stopped before these
        (study / f"{name}.json").unlink()
    measured_again = []
    plain_run = Stages.run
    monkeypatch.setattr(run, "ESSENTIAL", ())

    def watched(self, name, measure, beside=()):
        before = len(self.measured)
        found = plain_run(self, name, measure, beside)
        measured_again.extend(self.measured[before:])
        return found

    monkeypatch.setattr(Stages, "run", watched)
    with torch.no_grad():
        again = measured([MODEL], Options(**TINY), tmp_path / "out")
        write(again, tmp_path / "out")
    assert measured_again == ["steering", "swap"]
    assert again == results
    for name in ("results.json", "graph.json", "report.html", f"{MODEL}/hungry/steering.json"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def test_claims_hold_from_their_thresholds_on(tiny):
    study = copy.deepcopy(tiny[0]["models"][MODEL]["concepts"]["hungry"])

    def holds(name):
        return next(claim.holds for claim in judge(study) if claim.name == name)

    study["scored"]["auc"]["value"] = AUC
    study["geometry"]["rank"] = 10
    study["circuit"]["cue"] = [study["circuit"]["heads"][0][2]]
    assert all(map(holds, ("reads", "points at the word", "circuit")))
    study["scored"]["auc"]["value"] = AUC - 1e-6
    study["geometry"]["rank"] = 11
    study["circuit"]["cue"] = []
    assert not any(map(holds, ("reads", "points at the word", "circuit")))
    turned = next(row for row in study["activation"]["rows"] if row["times"] == 2)
    turned["beside"] |= {"value": 0.5, "high": 0.4}
    assert holds("says")
    turned["beside"]["high"] = 0.5
    assert not holds("says")
    study["ablation"]["word_beside"] |= {"value": 0.1, "low": -0.2, "high": 0.05}
    assert holds("head carries the word")
    assert next(c.found for c in judge(study) if c.name == "head carries the word").startswith("-0.1")


def test_options(capsys):
    assert parse_args([]).options == Options()
    assert parse_args(["--quick", "--words", "3"]).options == Options.quick(words=3)
    with pytest.raises(SystemExit):
        parse_args(["--words", "1"])
    assert "words must be 2 or more" in capsys.readouterr().err
    assert main(["--models", "tinystories-9l", "--out", "nowhere"]) == 2
    assert "tinystories-9l" in capsys.readouterr().err


# The planted cue ---------------------------------------------------------------------------------------------------


def test_two_hundred_sentences_with_a_cue_and_none_twice():
    found = cutting.sentences(HUNGRY, cutting.WORDS)
    assert len({pair.cue for pair in found}) == len(found) == 200
    assert all(pair.cue.endswith(END) and pair.cue != pair.swapped for pair in found)
    foods = {*HUNGRY.find.cues, *HUNGRY.score.cues, *cutting.MORE}
    assert all({*re.findall(r"\w+", pair.cue)} & foods for pair in found)


def test_a_cut_goes_on_along_the_graphs_edges():
    """By hand: a and c at the cut; b gets 6 of its 8 from a, of which c gives 2; errors stay."""
    nodes = (
        Node("target", 9, 5, value=10.0), Node("feature", 2, 5, 0, value=8.0, activation=4.0),
        Node("feature", 0, 2, 0, value=3.0, activation=3.0), Node("feature", 1, 2, 1, value=2.0, activation=2.0),
        Node("error", 0, 2, value=1.0),
    )  # fmt: skip
    weights = torch.tensor([[0, 5, 1, 0, 4], [0, 0, 2.5, 0.5, 1], [0] * 5, [0, 0, 2, 0, 0], [0] * 5])
    rest = torch.zeros(5)
    graph = Graph(nodes, weights, rest, ("a",) * 6, torch.tensor([1.0, 0, 0, 0, 0]))
    cut = torch.tensor([False, False, True, True, False])
    assert cutting.change(graph, cut) == pytest.approx(-1 + 5 * (-2.5 - 0.5) / 4)
    only_first = torch.tensor([False, False, True, False, False])  # c falls by 2 of its 2, so b by all of 0.5 as well
    assert cutting.change(graph, only_first) == pytest.approx(-1 + 5 * (-2.5 - 0.5) / 4)
    assert cutting.change(graph, torch.zeros(5, dtype=torch.bool)) == 0


def test_the_real_cut_takes_the_latents_at_the_cue_and_nothing_else():
    """One sentence alone, its latents' part taken out of each output by a hook."""
    subject = Subject.load(f"{MODEL}/output", Options(**TINY))
    pair = cutting.sentences(HUNGRY, 3)[4]
    others = [cutting.sentences(HUNGRY, 3)[0], pair]
    found = cutting.lead_change(subject, HUNGRY, others, [[3], [2, 3]])[1]
    tokens = subject.model.to_tokens(pair.cue, prepend_bos=False)

    def without(coder):
        def hook(value, hook):
            z = coder.encode(value[:, 2:4])
            value = value.clone()
            value[:, 2:4] -= coder.decode(z) - coder.decode(torch.zeros_like(z))
            return value

        return hook

    hooks = [(coder.cfg.out_site, without(coder)) for coder in subject.coders.values()]
    word, against = subject.token(" hungry"), subject.token(" sad")
    ends = [subject.model(tokens)[0, -1], subject.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]]
    before, after = (float(end[word] - end[against]) for end in ends)
    assert float(found) == pytest.approx(after - before, abs=1e-3)


def test_slope_and_correlation():
    x = torch.arange(5.0)
    assert cutting.slope(x, 3 - 2 * x) == pytest.approx(-2)
    assert cutting.correlation(x, 3 - 2 * x) == pytest.approx(-1)
    assert cutting.slope(torch.ones(5), x) == cutting.correlation(x, torch.ones(5)) == 0


def test_planted_claims_hold_from_their_thresholds_on():
    cut = {
        "model_auc": 0.95, "sentences": 3, "through": {"value": 0.9, "low": 0, "high": 1}, "chance": 0.2,
        "slope": {"value": 1.25, "low": 0, "high": 1}, "correlation": {"value": 0.8, "low": 0, "high": 1}, "lower": 0.9,
    }  # fmt: skip
    together = {"ce_clean": 2.0, "ce_spliced": 2.03 - 1e-9, "kl": 0.08}
    assert all(claim.holds for claim in judge_planted(cut, together))
    worse = {**cut, "model_auc": 0.949, "lower": 0.89}
    worse |= {
        key: {"value": v, "low": 0, "high": 1} for key, v in (("through", 0.89), ("slope", 1.26), ("correlation", 0.79))
    }
    assert not any(claim.holds for claim in judge_planted(worse, {**together, "kl": 0.081}))
    assert not judge_planted(cut, {})[1].holds


def test_kinds_of_dictionaries():
    assert Subject.load(MODEL, Options(**TINY)).kind == "block"
    output = Subject.load(f"{MODEL}/output", Options(**TINY))
    assert (output.name, output.model_name, output.first_layer) == (f"{MODEL}/output", MODEL, 0)
    assert list(output.coders) == [f"l{i}-out" for i in range(4)]
    assert output.together["kl"] > 0
    with pytest.raises(ValueError, match="block, write, output"):
        Subject.load(f"{MODEL}/wrote", Options(**TINY))
    with pytest.raises(ValueError, match="none of write dictionaries of tinystories-4l"):
        Subject.load(f"{MODEL}/write", Options(**TINY))


# The page ----------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_shows_every_claim(tiny):
    results, out = tiny
    page = (out / "report.html").read_text(encoding="utf-8")
    found = Tags()
    found.feed(page)
    pages = {p.name for p in out.glob("*.html")} | {str(p.relative_to(out)) for p in out.rglob("circuit.html")}
    assert set(found.addresses) <= {"data:,"} | pages
    for study in results["models"][MODEL]["concepts"].values():
        for claim in study["claims"]:
            assert f"needs: {claim['needs']}" in page
    claims = [c for s in results["models"][MODEL]["concepts"].values() for c in s["claims"]]
    assert page.count('class="fails"') == sum(not claim["holds"] for claim in claims)
    graph = json.loads((out / "graph.json").read_text(encoding="utf-8"))
    assert {"metadata", "qParams", "nodes", "links"} <= set(graph)
    assert len(list((out / "figures").glob("*.json"))) == 5


def test_texts_are_escaped():
    evil = "<script>alert(1)</script>"
    claim = {"name": evil, "says": evil, "needs": evil, "found": evil, "holds": False}
    report = Report("x", evil, evil, evil, evil, [Section(evil, evil, Table([evil], [[evil]]))])
    page = render(
        report, PAGE, groups=[group(evil, evil, {evil: {"claims": [claim]}})], links=[(evil, evil)], outcome=[evil]
    )
    assert "alert(1)</script>" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(tiny, tmp_path):
    """All scripts run to their end: every figure is drawn, nothing is asked from a network, no error is logged."""
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = ["chromium", *flags.split(), "--enable-unsafe-swiftshader", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    page = (tiny[1] / "report.html").as_uri()
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.count("main-svg") >= 4
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line and "rror" in line]


@pytest.mark.slow
def test_the_whole_study_at_its_quick_size(tmp_path, capsys):
    command = ["--quick", "--out", str(tmp_path), "--document", str(tmp_path / "case-study.md")]
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["models"]) == [MODEL, "tinystories-4l-real"]
    text = (tmp_path / "case-study.md").read_text(encoding="utf-8")
    for found in results["models"].values():
        claims = found["concepts"]["hungry"]["claims"]
        assert all(claim["found"] in text for claim in claims)
        fails = any(claim["name"] in run.ESSENTIAL and not claim["holds"] for claim in claims)
        others = {name: one["auc"] for name, one in found["selection"].items() if name != "hungry"}
        best = max(others, key=lambda name: others[name])
        assert list(found["concepts"]) == (["hungry", best] if fails else ["hungry"])
    assert str(tmp_path) in capsys.readouterr().out.replace("\n", "")
