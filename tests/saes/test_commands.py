"""`hooked-mamba sae`: trained, judged, looked at, pushed, listed and pulled on a tiny model; errors on one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from hooked_mamba import HookedMamba, cli
from hooked_mamba.model_hash import model_hash
from saes import SparseCoder, hub, mambacoder_config, sae_config
from saes.command_parts import coder_folders
from saes.explorer import explore
from saes.options import OptionError
from saes.run_options import run_options
from saes.settings import DATA, TRAIN, speaks_of_settings
from saes.store import DataConfig, ShardReader
from saes.training import RunConfig, TrainConfig
from tests.hooked_mamba.saved import save_tiny

APP = cli.make_app([EntryPoint("sae", "saes.commands:app", cli.GROUP)])
TEXT = "<|endoftext|>".join(["a b c d e f g", "h i j k", "l m n o p a b c", "d e f g h i j k l m n o p"] * 12)


def call(*arguments):
    return CliRunner().invoke(APP, ["sae", *map(str, arguments)])


def done(*arguments) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return result.output


def complaint(*arguments) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, f"{result.output} {result.exception!r}"
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), result.stderr
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a text and two coders of it."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    model = HookedMamba.from_pretrained(folder / "model")
    about = {"model_name": str(folder / "model"), "model_hash": model_hash(model)}
    configs = {
        "first": sae_config("blocks.1.mixer.hook_out_proj", 8, 24, k=3, **about),
        "second": mambacoder_config(0, 8, 16, architecture="topk", k=3, **about),
    }
    for i, (name, cfg) in enumerate(configs.items()):
        SparseCoder(cfg, seed=i).save(folder / "coders" / name)
    return folder


SMALL = ("--batch-size", 32, "--context-length", 16, "--set", "data.block_tokens=128", "-q")


def test_help_names_every_command():
    text = done("--help")
    for name in ("train", "eval", "explore", "push", "pull", "list"):
        assert name in text
    assert "--d-sae" in done("train", "--help")


def test_train_by_flags(place, tmp_path):
    shared = ("--model", place / "model", "--text", place / "text.txt", "--steps", 4, *SMALL)
    said = done("train", *shared, "--layer", 0, "--layer", 1, "--d-sae", 24, "--k", 3, "--out", tmp_path / "run")
    assert "l0-mambacoder" in said
    coder = SparseCoder.load(tmp_path / "run" / "coders" / "l1-mambacoder")
    assert (coder.cfg.architecture, coder.cfg.d_sae, coder.cfg.k, coder.cfg.layer) == ("batchtopk", 24, 3, 1)


def test_flags_go_before_the_file(place, tmp_path):
    options = {
        "model": str(place / "model"),
        "text": "nowhere.txt",
        "out": str(tmp_path / "wrong"),
        "coders": [{"name": "mine", "site": "out_proj", "layer": 1, "d_sae": 16, "k": 2}],
        "train": {"n_tokens": 10**9, "lr": 0.5},
        "data": {"batch_size": 16},
    }
    (tmp_path / "run.json").write_text(json.dumps(options))
    done("train", tmp_path / "run.json", "--text", place / "text.txt", "--out", tmp_path / "run", "--steps", 3, *SMALL)
    assert SparseCoder.load(tmp_path / "run" / "coders" / "mine").cfg.d_sae == 16
    assert not (tmp_path / "wrong").exists()


def test_the_documents_file_of_options_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "explorer.md").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    config = RunConfig.from_file(tmp_path / "run.toml")
    assert [spec.get("site") for spec in config.coders] == [None, "out_proj"]
    documented = set(re.findall(r"`hooked-mamba (sae )?(\w+)", text))
    app = get_command(cli.make_app())
    commands = {("", name) for name, command in app.commands.items() if name != "sae" and not command.hidden}
    assert documented == commands | {("sae ", name) for name in app.commands["sae"].commands}


def test_options_from_file_and_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "m"\ntext = "t"\nout = "o"\n[train]\nn_tokens = 5\nwarmup = 0.5\n[[coders]]\nlayer=0\nd_sae=8\n'
    )
    made = run_options(
        path, {"train.steps": 7, "train.lr": None, "device": "cuda"}, ["train.decay=0.1", "data.dtype=x"]
    )
    assert made == {
        "model": "m",
        "text": "t",
        "out": "o",
        "device": "cuda",
        "train": {"warmup": 0.5, "steps": 7, "decay": 0.1},
        "data": {"dtype": "x"},
        "coders": [{"layer": 0, "d_sae": 8}],
    }
    flags = {"text": "t", "out": "o", "layer": [0, 2], "site": "x", "d_sae": 8, "train.steps": 3}
    made = run_options(None, flags)
    assert made["coders"] == [{"site": "x", "d_sae": 8, "layer": 0}, {"site": "x", "d_sae": 8, "layer": 2}]
    assert made["model"] == "tinystories-4l"


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ({}, [], "a training needs --text and --out"),
        ({"text": "t", "out": "o"}, [], "a training needs its length: --n-tokens or --steps"),
        ({"text": "t", "out": "o", "train.steps": 3}, [], "a training needs coders"),
        ({"text": "t", "out": "o", "layer": [0]}, [], "--d-sae is missing"),
        ({"text": "t", "out": "o", "d_sae": 8}, [], "--layer is missing"),
        ({"text": "t"}, ["train.warmup"], "--set takes KEY=VALUE"),
        ({"text": "t"}, ["trian.warmup=1"], "nearest: train"),
    ],
)
def test_options_that_do_not_make_a_run(flags, settings, message):
    with pytest.raises(OptionError, match=message):
        run_options(None, flags, settings)


def test_a_training_is_continued_by_its_folder_alone(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    out = tmp_path / "run"
    shared = ("--model", "model", "--text", "text.txt", "--layer", 1, "--d-sae", 24, "--k", 3, *SMALL)
    done("train", *shared, "--steps", 4, "--out", out)
    whole = SparseCoder.load(out / "coders" / "l1-mambacoder")
    assert "pass --resume to continue" in complaint("train", *shared, "--steps", 4, "--out", out)
    kept = json.loads((out / "run.json").read_text())
    assert kept["text"] == str(place / "text.txt")
    assert RunConfig.from_dict(kept).train["steps"] == 4
    shutil.rmtree(out / "coders")
    monkeypatch.chdir(tmp_path)  # paths that were given relative to another folder
    for again in (("--resume", "--out", "run"), ("run", "--resume"), (*shared[4:], "--resume", "--out", out)):
        done("train", *again, "-q")
        same = SparseCoder.load(out / "coders" / "l1-mambacoder")
        assert torch.equal(same.W_dec, whole.W_dec)
    shutil.copytree(out, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "coders")
    done("train", "--resume", "--out", tmp_path / "moved", "-q")
    assert (tmp_path / "moved" / "coders" / "l1-mambacoder").is_dir()
    assert "this run 9" in complaint("train", "--resume", "--out", out, "--steps", 9, "-q")
    assert "--resume needs the folder of the training to continue: --out" in complaint("train", "--resume")
    assert "there is no training to resume in" in complaint("train", "--resume", "--out", tmp_path / "nothing")
    assert "holds no run.json" in complaint("train", place)


def test_the_folder_of_a_training_stands_for_its_coders(place, tmp_path):
    out, text = tmp_path / "run", ("--text", place / "text.txt", "--context-length", 16, "-q")
    shared = ("--model", place / "model", "--text", place / "text.txt", "--steps", 4, *SMALL, "--out", out)
    result = call("train", *[a for a in shared if a != "-q"], "--layer", 0, "--layer", 1, "--d-sae", 24, "--k", 3)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"loading {place / 'model'} ...\n")
    assert "l1-mambacoder" in done("eval", out, *text, "--n-tokens", 50, "--metric", "l0")
    assert SparseCoder.from_pretrained(out, "l0-mambacoder").cfg.layer == 0
    with pytest.raises(ValueError, match="it contains the coders coders/l0-mambacoder, coders/l1-mambacoder"):
        SparseCoder.load(out)
    done("push", out, "--to", tmp_path / "shelf")
    card = (tmp_path / "shelf" / "README.md").read_text()
    assert "| name | ev | l0 | dead\\_share |" in card
    assert "l1-mambacoder: text text.txt, context\\_length 16, tokens 128, steps 4" in card
    assert "metrics\\_from the last training batches" in card
    entry = {e.name: e for e in hub.list_coders(tmp_path / "shelf")}["l1-mambacoder"]
    assert entry.training["tokens"] == 128
    assert set(entry.metrics) == {"ev", "l0", "dead_share"}
    about = json.loads((tmp_path / "shelf" / "l1-mambacoder" / "cfg.json").read_text())["metadata"]
    assert (about["context_size"], about["prepend_bos"]) == (16, False)
    hub.push({"judged": out / "coders" / "l0-mambacoder"}, tmp_path / "shelf", metrics={"fvu": 0.5})
    assert "metrics_from" not in {e.name: e for e in hub.list_coders(tmp_path / "shelf")}["judged"].training


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("warmup must be a number from 0", "--set train.warmup must be a number from 0"),
        ("block_tokens (9) must be at least", "--set data.block_tokens (9) must be at least"),
        ("checkpoint has train.b_dec = 'mean'", "checkpoint has train.b_dec = 'mean'"),
    ],
)
def test_errors_name_settings(said, shown):
    @speaks_of_settings
    def fails():
        raise ValueError(said)

    with pytest.raises(ValueError, match=f"^{re.escape(shown)}$"):
        fails()


def test_every_setting_is_an_option():
    assert {*TRAIN} < {*TrainConfig.__dataclass_fields__}
    assert {*DATA} < {*DataConfig.__dataclass_fields__}


def test_train_errors_are_one_line(place, tmp_path):
    base = ("--text", place / "text.txt", "--out", tmp_path / "x", "--model", place / "model", "--steps", 2)
    coder = ("--layer", 0, "--d-sae", 16, "--k", 2)
    assert "nearest: warmup" in complaint("train", *base, *coder, "--set", "train.warmpu=1")
    assert "out of range: the model has 2" in complaint("train", *base, "--layer", 5, "--d-sae", 16)
    (tmp_path / "run.toml").write_text("[[coders]]\nlayer=0\nd_sea=8\n")
    assert "d_sae" in complaint("train", tmp_path / "run.toml", *base)
    assert "so do the flags (--layer, --d-sae, --k)" in complaint("train", tmp_path / "run.toml", *base, *coder)
    assert "nothing.json" in complaint("train", tmp_path / "nothing.json", *base)
    assert not (tmp_path / "x" / "coders").exists()


def test_errors_name_what_is_missing(place, tmp_path):
    said = complaint("train", "--resume", "--out", tmp_path / "none")
    assert f"there is no training to resume in {tmp_path / 'none'}" in said
    said = complaint(
        "train", "--text", tmp_path / "no.txt", "--layer", 0, "--d-sae", 32, "--steps", 1, "--out", tmp_path
    )
    assert said == f"error: --text: '{tmp_path / 'no.txt'}' does not exist"


MISSING = [
    ("train", "--layer", 0, "--d-sae", 8, "--steps", 1, "--out", "x", "--text"),
    ("finetune", "coders/first", "--steps", 1, "--out", "x", "--text"),
    ("eval", "coders/first", "--text"),
    ("eval", "coders/first", "--text", "text.txt", "--json"),
    ("eval", "coders/first", "--text", "text.txt", "--metric"),
    ("capture", "--site", "hook_embed", "--out", "x", "--text"),
    ("explore", "coders/first", "--text"),
    ("explore", "coders/first", "--text", "text.txt", "--labels"),
    ("explore", "coders/first", "--text", "text.txt", "--out"),
]
"""Commands whose last option gets what cannot be."""


@pytest.mark.parametrize("line", MISSING, ids=lambda line: f"{line[0]}{line[-1]}")
def test_inputs_are_looked_at_before_a_model_is_loaded(line, place, monkeypatch):
    def loads(*_, **__):
        raise AssertionError("a model was loaded first")

    monkeypatch.chdir(place)
    monkeypatch.setattr("saes.command_parts.load_model", loads)
    monkeypatch.setattr(sys.modules["saes.training.run"], "load_model", loads)
    monkeypatch.setattr("hooked_mamba.models.load_model", loads)
    flag = line[-1]
    wrong = {"--text": "texd.txt", "--labels": "texd.txt", "--metric": "fvv"}.get(flag, "coders")
    said = complaint(*line, wrong)
    if flag == "--metric":
        assert "nearest" in said
        return
    assert said.startswith(f"error: {flag}: ")
    assert f"near it in {place}: text.txt" in said or "coders is a folder" in said


def test_a_finetuning_into_a_folder_with_checkpoints_is_refused_first(place, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    monkeypatch.setattr("saes.command_parts.load_coders", None)
    line = ("finetune", place / "coders" / "first", "--text", place / "text.txt", "--steps", 9, "--out", tmp_path)
    assert "pass --resume to continue" in complaint(*line)


def test_an_unknown_coder_is_told_of_its_model(place):
    text = ("--text", place / "text.txt")
    said = complaint("eval", "tinystories-mamba2-4l/l2-ouu", *text)
    assert (
        "; of tinystories-mamba2-4l there are tinystories-mamba2-4l/l2-mambacoder, tinystories-mamba2-4l/l2-out" in said
    )
    assert said.endswith("`hooked-mamba sae list` lists all")
    assert "tinystories-4l/" not in said
    assert "; near it are tinystories-4l/l1-out" in complaint("eval", "tinystories-4l-l1-out", *text)


def test_a_failed_fetch_names_bundled_coders_that_are_near(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(hub.HubError, match=r"near it are tinystories-4l/l1-out.*sae list` lists all"):
        SparseCoder.from_pretrained("tinystorys-4l/l1-out")


def test_eval(place, tmp_path):
    arguments = (place / "coders", "--text", place / "text.txt", "--context-length", 16, "--n-tokens", 200, "-q")
    said = done("eval", *arguments, "--metric", "reconstruction", "--metric", "l0", "--json", tmp_path / "r.json")
    assert "first" in said
    assert "second" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert [scores["name"] for scores in report["coders"]] == ["first", "second"]
    assert set(report["coders"][0]["values"]) >= {"fvu", "l0"}
    assert "ce_clean" not in report["coders"][0]["values"]
    assert "nearest: " in complaint("eval", *arguments, "--metric", "fuv")


def test_explore(place, tmp_path):
    out = tmp_path / "deep" / "page.html"
    (tmp_path / "names.json").write_text('{"first": {"3": "three"}}')
    text = ("--text", place / "text.txt", "--context-length", 16, "-q")
    said = done("explore", place / "coders", *text, "--out", out, "--labels", tmp_path / "names.json")
    assert str(out) in said
    page = out.read_text()
    coders = {name: SparseCoder.load(path) for name, path in coder_folders([str(place / "coders")]).items()}
    model = HookedMamba.from_pretrained(place / "model")
    options = {"context_length": 16, "n_tokens": 100_000, "progress": False}
    assert page == explore(model, coders, place / "text.txt", labels={"first": {3: "three"}}, **options).page().html
    done("explore", place / "coders" / "first", *text, "--out", out, "--feature", 3, "--top", 2)
    assert 'class="single"' in out.read_text()
    assert "first has features 0 to 23" in complaint(
        "explore", place / "coders" / "first", *text, "--out", out, "--feature", 24
    )
    (tmp_path / "names.json").write_text('{"x3": "three"}')
    assert "got 'x3'" in complaint("explore", place / "coders" / "first", *text, "--labels", tmp_path / "names.json")


def test_a_coder_of_another_model_is_noticed(place, tmp_path):
    save_tiny(tmp_path / "other", seed=1)
    arguments = (place / "coders" / "first", "--text", place / "text.txt", "--metric", "l0", "-q", "--n-tokens", 50)
    result = call("eval", *arguments, "--model", tmp_path / "other")
    assert result.exit_code == 0
    assert "first was trained on other weights than those of" in result.stderr
    assert call("eval", *arguments).stderr == ""
    SparseCoder(sae_config("hook_embed", 8, 16, k=2), seed=0).save(tmp_path / "nameless")
    nameless = (tmp_path / "nameless", *arguments[1:])
    assert "which model to run: --model" in complaint("eval", *nameless)


def test_push_list_and_pull_a_folder(place, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    assert str(shelf) in done("push", place / "coders", "--to", shelf)
    listed = done("list", "--in", shelf)
    assert "first" in listed
    assert "second" in listed
    assert "second" not in done("list", "--in", shelf, "--kind", "sae")
    assert call("list", "nosuchword", "--in", shelf).exit_code == 1
    done("pull", shelf, "--name", "first", "--out", tmp_path / "mine")
    mine, theirs = SparseCoder.load(tmp_path / "mine"), SparseCoder.load(place / "coders" / "first")
    assert mine.cfg == theirs.cfg
    assert torch.equal(mine.W_dec, theirs.W_dec)
    done("push", place / "coders" / "first", "--to", shelf, "--name", "renamed")
    assert "renamed" in done("list", "--in", shelf)
    assert "FVU" not in listed  # nothing was measured
    SparseCoder.load(place / "coders" / "first").save(tmp_path / "judged", metrics={"fvu": 0.123456})
    done("push", tmp_path / "judged", "--to", shelf)
    assert "0.123" in done("list", "judged", "--in", shelf)
    assert "--name is for one coder" in complaint("push", place / "coders", "--to", shelf, "--name", "x")
    assert "name one of" in complaint("pull", shelf, "--out", tmp_path / "y")
    assert "does not exist" in complaint("pull", tmp_path / "nothing here", "--out", tmp_path / "y")
    assert "first" in complaint("pull", shelf, "--name", "frist", "--out", tmp_path / "y")


def test_coders_by_name(place, tmp_path):
    coders = place / "coders"
    assert list(coder_folders([str(coders)])) == ["first", "second"]
    twice = coder_folders([str(coders / "second"), str(coders / "second")])
    assert len(twice) == 2
    assert "has no coder" in complaint("eval", tmp_path, "--text", place / "text.txt")


def test_work_in_pieces_gives_the_same_report_and_page(tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("Tom was hungry. He ate some toast.\n<|endoftext|>\nLily was so sad.\n<|endoftext|>\n" * 6)
    common = ("tinystories-4l/l2-out", "--text", text, "--context-length", 16, "--quiet")
    reports = []
    for more in ((), ("--work", tmp_path / "work"), ("--work", tmp_path / "work")):
        done("eval", *common, "--json", tmp_path / "report.json", *more)
        reports.append(json.loads((tmp_path / "report.json").read_text())["coders"][0]["values"])
    assert reports[1] == reports[2]
    assert reports[1] == pytest.approx(reports[0], rel=1e-6)
    done("explore", *common, "--feature", 3, "--work", tmp_path / "pieces", "--out", tmp_path / "page.html")
    assert (tmp_path / "pieces" / "manifest.json").exists()
    acts = tmp_path / "acts"
    said = done("capture", *common[1:], "--site", "blocks.1.mixer.hook_x", "--out", acts)
    assert "positions of 1 sites" in said
    assert ShardReader(acts).widths == {"blocks.1.mixer.hook_x": 384}


def test_processes_need_a_folder_to_share_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "text.txt").touch()
    result = call("eval", "tinystories-4l/l2-out", "--text", tmp_path / "text.txt")
    assert result.exit_code == 2
    assert "--work" in result.output
