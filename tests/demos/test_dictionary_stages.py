"""Write dictionaries that go on from bundled ones by another architecture, and what their card says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from demos.dictionaries import bundle, cards, cuttings, presets, samples, table, train, tune, walks
from demos.tinystories.text import read_stories
from hooked_mamba import load_model
from saes import SparseCoder
from saes.training import coder_config
from tests.demos.test_dictionaries import arguments, folder  # noqa: F401 (a fixture)


def test_a_card_says_who_told_what() -> None:
    assert "training mix" in cards.text_of([["0"], ["0"]])
    both = cards.text_of([["0.5", "a"], ["0.5", "a"]])
    assert both.startswith("50% of the rows are stories that a told at temperature 1: text")
    apart = cards.text_of([["0.5", "a"], ["0"], ["0.8", "a", "b", "c"]])
    assert "Of stage 1 50% of the rows are stories that a told" in apart
    assert "of stage 2 no row was told by a model" in apart
    assert "of stage 3 80% of the rows are stories that a, b and c told" in apart
    assert apart.endswith(cards.REST)
    assert cards.text_of([["0"]], "All rows are walks.").endswith("heart. All rows are walks.")


def test_storing_again_keeps_what_a_card_and_files_say(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Also of coders whose card has no section about write dictionaries."""
    first = ["--layers", "0", "--d-sae", "24", "--architecture", "topk", "--k", "3", "--site", "x", "--steps", "2"]
    assert train.main(arguments(folder, tmp_path / "run", *first)) == 0
    shown = ["--valid", str(folder / "text.txt"), "--to", str(tmp_path / "to"), "--model", str(folder)]
    bundle.main(["--run", str(tmp_path / "run"), *shown])
    before = (tmp_path / "to" / "README.md").read_text()
    coder = tmp_path / "to" / "l0-write"
    SparseCoder.load(coder).save(coder, training={"text": "mine.txt"}, metrics={"mine": 3.0})
    bundle.main(["--again", "--dtype", "bfloat16", *shown])
    assert "in float16" in before
    after = (tmp_path / "to" / "README.md").read_text()
    assert before[before.index("## Training") :] in after
    found = json.loads((coder / "cfg.json").read_text())
    assert found["dtype"] == "bfloat16"
    assert found["hooked_mamba"]["training"] == {"text": "mine.txt"}
    assert found["hooked_mamba"]["metrics"]["mine"] == 3.0


@pytest.mark.parametrize("wrong", ["0", "-3", "x"])
def test_texts_are_at_least_one(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (cuttings, walks):
        with pytest.raises(SystemExit):
            command.main(["--text", "x", "--out", "y", f"--stories={wrong}"])
        assert f"expected a whole number of 1 or more, got '{wrong}'" in capsys.readouterr().err


def test_going_on_from_what_is_bundled(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, to = str(folder / "text.txt"), tmp_path / "to"
    first = ["--layers", "0", "1", "--d-sae", "24", "--architecture", "topk", "--k", "3", "--site", "x", "--steps", "6"]
    assert train.main(arguments(folder, tmp_path / "first", *first)) == 0
    shared = ["--model", str(folder), "--text", words, "--rows", "4", "--context", "16"]
    assert tune.main(["--run", str(tmp_path / "first"), *shared, "--n-tokens", "64", "--out", str(tmp_path / "a")]) == 0
    shown = ["--valid", words, "--to", str(to), "--model", str(folder)]
    bundle.main(["--run", str(tmp_path / "a"), "--before", str(tmp_path / "first"), *shown])
    before = (to / "README.md").read_text()

    line = ["--run", str(to), "--match", "write", "--architecture", "batchtopk", "--k", "2", *shared]
    assert tune.main([*line, "--n-tokens", "128", "--out", str(tmp_path / "b")]) == 0
    bundle.main(
        ["--run", str(tmp_path / "b"), "--onwards", "--told", "0.8", "x", "y", "--note", "It began so.", *shown]
    )
    card = (to / "README.md").read_text()
    assert card.count("## Training") == 1
    earlier = " ".join(before.partition("## Training of the write dictionaries")[2].partition(cards.FIGURES)[0].split())
    assert earlier in card, "what they went on from is still said"
    assert "From there, as batchtopk with k=2: 128 positions in 2 steps through the model" in card
    assert "80% of the rows are stories that x and y told" in card
    assert f"It began so. {cards.FIGURES}" in card
    assert SparseCoder.load(to / "l1-write").cfg.architecture == "batchtopk"

    large = (to / "l1-write" / "sae_weights.safetensors").stat().st_size
    with pytest.raises(SystemExit):
        bundle.main(["--again", *shown, "--text", words, "--average", "2"])
    assert "--average, --text: for --run; with --again" in capsys.readouterr().err
    bundle.main(["--again", "--dtype", "float8_e4m3fn", *shown])
    assert "files as stored, in float8_e4m3fn;" in " ".join((to / "README.md").read_text().split())
    assert (to / "README.md").read_text().count("## Training") == 1
    assert f"It began so. {cards.FIGURES}" in (to / "README.md").read_text()
    assert (to / "l1-write" / "sae_weights.safetensors").stat().st_size < 0.75 * large
    assert json.loads((to / "evaluation.json").read_text())["write"]["together"]["values"]["kl"] >= 0

    line = ["--of", "write", str(tmp_path / "b"), "--model", str(folder), "--valid", words]
    active = []
    for n, more in enumerate(([], ["--text", words])):
        table.main([*line, *more, "--json", str(tmp_path / f"{n}.json")])
        active.append(next(iter(json.loads((tmp_path / f"{n}.json").read_text()).values()))[0]["l0"])
    assert abs(active[1] - 2) < 0.2, "thresholds are set anew"
    assert active[0] != active[1]


def test_several_folders_are_the_means_of_their_weights() -> None:
    of = [{"a": SparseCoder.from_pretrained(f"tinystories-told-4l/l{i}-write")} for i in (0, 1)]
    wanted = {name: (value + of[1]["a"].state_dict()[name]) / 2 for name, value in of[0]["a"].state_dict().items()}
    for name, value in tune.mean_of(of)["a"].state_dict().items():
        torch.testing.assert_close(value, wanted[name])


def test_the_same_weights_by_another_architecture() -> None:
    topk = SparseCoder.from_pretrained("tinystories-4l-real/l0-out")
    other = tune.chosen_by(topk, "batchtopk", 7)
    assert (other.cfg.architecture, other.cfg.k) == ("batchtopk", 7)
    for name, value in topk.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", presets.COMPARED)
def test_kinds_are_compared_at_equal_width(name: str) -> None:
    """Of every kind four layers, and all as wide, but for the values of attention."""
    model = load_model(name)
    found = {spec["name"]: coder_config(model, spec) for spec in presets.specs(name, kind="compared")}
    assert set(found) == {f"l{i}-{kind}" for i in range(4) for kind in ("write", "mambacoder", "out")}
    assert {(cfg.d_sae, cfg.k) for n, cfg in found.items() if "attn.hook_v" not in cfg.out_site} == {(672, 31)}
    for i in range(4):
        block, out = found[f"l{i}-mambacoder"], found[f"l{i}-out"]
        assert block.out_site == out.out_site == out.in_site
        assert block.in_site == f"blocks.{i}.norm.hook_out"


def test_texts_are_cut_together_from_stories(tmp_path: Path) -> None:
    """Every sentence is one of the stories', up to three in a row; the same on every run, and not for another seed."""
    stories = [
        f'{name} ran. {name} sat down. {name} said, "Oh!" {name}\nslept? So it was.' for name in ("Ann", "Bo", "Cy")
    ]
    stories.append("One is too short. It is left out.")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(stories))
    made = []
    for n, seed in enumerate(("3", "3", "4")):
        line = ["--text", str(tmp_path / "text.txt"), "--stories", "9", "--seed", seed, "--out", str(tmp_path / str(n))]
        cuttings.main(line)
        made.append(read_stories(tmp_path / str(n)))
    assert made[0] == made[1]
    assert made[0] != made[2]
    known = [cuttings.SENTENCE.findall(story.replace("\n", " ")) for story in stories]
    assert known[0] == ["Ann ran.", "Ann sat down.", 'Ann said, "Oh!"', "Ann slept?", "So it was."]
    for text in made[0]:
        found = cuttings.SENTENCE.findall(text)
        assert cuttings.SENTENCES <= len(found) < cuttings.SENTENCES + 3
        assert set(found) <= {sentence for story in known[:3] for sentence in story}
    assert len(made[0]) == 9
    with pytest.raises(ValueError, match="no story has more than three sentences"):
        next(cuttings.cuttings(["One. Two."], 1))


def test_walks_go_through_a_text_by_what_is_the_same() -> None:
    """Every four tokens in a row stand in the text, walks go on elsewhere, and none crosses an end."""
    draw = torch.Generator().manual_seed(0)
    stream = [0]
    for _ in range(40):
        stream += [*torch.randint(1, 4, (12,), generator=draw).tolist(), 0]
    made = list(walks.walks(stream, 0, 30, tokens=20, seed=1))
    real = {tuple(stream[i : i + 4]) for i in range(len(stream))}
    documents = {tuple(one) for one in "".join(map(str, stream)).split("0")}
    assert len(made) == 30
    assert all(0 not in walk and len(walk) <= 20 for walk in made)
    assert all(tuple(walk[i : i + 4]) in real for walk in made for i in range(len(walk) - 3))
    assert any(len(walk) == 20 for walk in made)
    assert sum(tuple(map(str, walk)) in documents for walk in made) < 10, "most are new"
    assert made == list(walks.walks(stream, 0, 30, tokens=20, seed=1))
    assert list(walks.walks([0, 1, 0], 0, 3)) == [[1]] * 3, "the first tokens have too few before them to go elsewhere"
    assert [len(walk) for walk in walks.walks([0, 0, 5, 0, 0], 0, 3)] == [1, 1, 1], "none begins in an empty document"
    for nothing in ([], [0], [0, 0], [5]):
        with pytest.raises(ValueError, match="nothing to walk through"):
            next(walks.walks(nothing, 0, 1))


def test_walks_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "The cat sat on the mat. It was a good cat.\n<|endoftext|>\nThe dog sat on it.\n"
    )
    line = ["--model", "tinystories-4l", "--text", str(tmp_path / "text.txt"), "--stories", "3"]
    walks.main([*line, "--out", str(tmp_path / "out.txt")])
    found = read_stories(tmp_path / "out.txt")
    assert len(found) == 3
    assert all(text.startswith("The ") for text in found)


def test_what_texts_cannot_be_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The cat sat.")
    with pytest.raises(SystemExit):
        cuttings.main(["--text", "text.txt", "--out", "./text.txt"])
    assert "--out is --text, text.txt: it would be overwritten" in capsys.readouterr().err
    assert cuttings.main(["--text", "not/there.txt", "--out", "y"]) == 2
    assert "not/there.txt" in capsys.readouterr().err
    assert cuttings.main(["--text", "text.txt", "--out", "new/y"]) == 2
    assert "nothing to cut from" in capsys.readouterr().err
    for command, more in ((walks, ["--text", "text.txt"]), (samples, [])):
        assert command.main(["--model", "tinystories-5l", *more, "--out", "z"]) == 2
        assert "tinystories-5l" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "text.txt"]
