"""The script that trains dictionaries, on a small folder; and its presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from circuits import FrozenModel, build_graph, scores, top_logits
from demos.dictionaries import bound, bundle, explained, presets, samples, table, text, train, tune
from demos.dictionaries.text import training_rows
from hooked_mamba import HookedMamba, HookedMamba2
from saes import SparseCoder, evaluate
from saes.hub import list_coders
from saes.store import DataConfig, read_text_file, take
from saes.training import coder_config
from tests.saes.training.test_run import TEXTS, WORDS, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hooked_mamba import MambaConfig

    path = tmp_path_factory.mktemp("model")
    made = HookedMamba(MambaConfig(d_model=8, n_layers=2, d_vocab=len(WORDS), d_state=3), tokenizer(), seed=0)
    made.save_pretrained(path)
    (path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    known = f"--model {folder} --text {folder / 'text.txt'} --out {out} --batch-size 32 --context 16 --block 128"
    return [*known.split(), *more]


def test_coders_of_any_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--layers", "0", "1", "--d-sae", "24", "--architecture", "topk", "--k", "3", "--skip", "--steps", "6"]
    assert train.main(arguments(folder, tmp_path, *asked)) == 0
    said = capsys.readouterr().out
    assert "l0-mambacoder" in said
    assert "192 tokens in" in said
    assert "100,000,000 would take" in said
    coder = SparseCoder.load(tmp_path / "coders" / "l1-mambacoder")
    assert (coder.cfg.d_sae, coder.cfg.k, coder.cfg.input_norm) == (24, 3, "none")
    assert coder.cfg.skip
    assert train.main(arguments(folder, tmp_path, *asked)) == 2
    assert "resume" in capsys.readouterr().err
    assert train.main(arguments(folder, tmp_path, *asked, "--resume")) == 0


def test_finished_coders_are_measured_and_stored_in_half_precision(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--layers", "0", "1", "--d-sae", "24", "--variant", "topk", "--k", "3"]
    asked += ["--site", "out_proj", "--steps", "6"]
    assert train.main(arguments(folder, tmp_path / "run", *asked)) == 0
    text, to = str(folder / "text.txt"), tmp_path / "to"
    bundle.main(["--run", str(tmp_path / "run"), "--valid", text, "--to", str(to), "--model", str(folder)])
    assert "all together" in capsys.readouterr().out
    entries = {entry.name: entry for entry in list_coders(to)}
    assert list(entries) == ["l0-out", "l1-out"]
    metrics = entries["l1-out"].metrics
    assert {"ev", "l0", "ce_recovered_zero", "dead_share"} <= metrics.keys()
    assert metrics["l0"] == 3
    with safe_open(to / "l1-out" / "sae_weights.safetensors", framework="pt") as file:
        assert file.get_tensor("W_dec").dtype == torch.float16
    assert json.loads((to / "evaluation.json").read_text())["sae"]["together"] is not None
    card = (to / "README.md").read_text()
    assert "l1-out" in card
    assert "192 positions (repeats counted) in 6 steps" in card
    other = HookedMamba.from_pretrained(folder)
    other.embed.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on weights"):
        bundle.bundle(tmp_path / "run", folder / "text.txt", to, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", "has no preset"),
        ("--layers 0", "needs --d-sae"),
        ("--layers 5 --d-sae 9", "layer 5 is out of range"),
        ("--layers 0 --d-sae 9 --site xx", "no hook site is named"),
        ("--layers 0 --d-sae 99 --dataset x", "one of them"),
    ],
)
def test_wrong_questions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, message: str
) -> None:
    assert train.main(arguments(folder, tmp_path, "--steps", "3", *asked.split())) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_fit_their_models(name: str) -> None:
    model = (HookedMamba2 if "mamba2" in name else HookedMamba).from_pretrained(name)
    configs = [coder_config(model, spec) for spec in presets.specs(name)]
    assert {cfg.model_name for cfg in configs} == {name}
    numbers = sum(2 * cfg.d_in * cfg.d_sae + cfg.d_sae + cfg.d_out for cfg in configs)
    assert numbers * 2 < 12e6, "in half precision"
    with pytest.raises(ValueError, match="preset has its own"):
        presets.specs(name, d_sae=64)


def test_a_coder_of_what_a_position_gives_itself() -> None:
    """On the command line as in a config; the name says which kind it is."""
    (spec,) = presets.specs("any", [1], d_sae=40, target="local")
    assert spec == {"name": "l1-mambacoder-local", "layer": 1, "d_sae": 40, "target": "local"}
    assert coder_config(HookedMamba.from_pretrained("tinystories-4l"), spec).target == "local"


@pytest.mark.parametrize("wrong", ["many", "0", "-1", "2.5"])
def test_a_window_is_a_number_or_the_taps(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--out", "x", f"--window={wrong}"])
    assert f"expected a number of positions or 'taps', got '{wrong}'" in capsys.readouterr().err


def test_the_told_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled models' own mix: most rows from the file, some from the grammar."""
    monkeypatch.setitem(text.MIXES, "tinystories-4l", text.TOLD._replace(stories=50))
    model = HookedMamba.from_pretrained("tinystories-4l")
    (tmp_path / "text.txt").write_text("The cat sat.\n<|endoftext|>\n" * 50)
    rows = training_rows(model, tmp_path / "text.txt", None, None, DataConfig(context_length=32))
    taken = take(rows, 100)
    assert taken is not None
    cat = model.to_single_token(" cat")
    from_file = (taken.tokens == cat).float().mean(1) > 0.1
    assert 0.75 < from_file.float().mean() < 0.95
    alone = take(training_rows(model, tmp_path / "text.txt", None, 0.0, DataConfig(context_length=32)), 20)
    assert alone is not None
    assert bool(((alone.tokens == cat).float().mean(1) > 0.1).all())
    assert alone.tokens.dtype == torch.long


def test_the_table_of_means_is_the_best_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = str(folder / "text.txt")
    found = bound.main(["--model", str(folder), "--text", words, "--valid", words, "--rows", "16"])
    assert "explained variance" in capsys.readouterr().out
    assert 0 < found.explained_variance < 1
    model = HookedMamba.from_pretrained(folder)
    rows = training_rows(model, folder / "text.txt", None, 0.0, DataConfig(context_length=16))
    means, mean = bound.means_by_token(model, rows, 16, pull=0.0)
    held_out = [torch.randint(1, 17, (2, 16), generator=torch.Generator().manual_seed(0))]
    without = bound.measure(model, mean.expand_as(means), mean, held_out)
    assert without.explained_variance == pytest.approx(0, abs=1e-5)
    assert without.zero != without.table


def test_write_dictionaries_from_samples_to_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples, a first training, fine-tuning, the table, and a bundle that keeps what stood there."""
    words, told = str(folder / "text.txt"), tmp_path / "told.txt"
    samples.main(["--model", str(folder), "--stories", "5", "--out", str(told)])
    again = list(samples.tell(HookedMamba.from_pretrained(folder), 5))
    assert read_text_file(str(told)) == [story.strip() for story in again if story.strip()]
    asked = ["--layers", "0", "1", "--d-sae", "24", "--architecture", "batchtopk", "--k", "3", "--samples", str(told)]
    run, tuned, to = tmp_path / "run", tmp_path / "tuned", tmp_path / "to"
    assert train.main(arguments(folder, run, *asked, "--site", "x", "--steps", "6")) == 0
    assert train.main(arguments(folder, tmp_path / "out", *asked, "--site", "out_proj", "--steps", "6")) == 0
    line = ["--run", str(run), "--match", "write", "--model", str(folder), "--text", words, "--samples", str(told)]
    line += ["--rows", "4", "--context", "16", "--n-tokens", "256", "--out", str(tuned)]
    assert tune.main(line) == 0
    assert tune.main(line) == 2
    assert "resume" in capsys.readouterr().err
    assert tune.main([*line, "--resume"]) == 0
    assert SparseCoder.load(tuned / "coders" / "l1-write").cfg.in_site == "blocks.1.mixer.hook_x"
    assert tune.main([*line, "--match", "nothing"]) == 2

    asked = ["--of", "write", str(tuned), "write", "--of", "output", str(tmp_path / "out")]
    table.main([*asked, "--model", str(folder), "--valid", words, "--json", str(tmp_path / "table.json")])
    found = next(iter(json.loads((tmp_path / "table.json").read_text()).values()))
    coders = tune.coders_in(tuned)
    model = HookedMamba.from_pretrained(folder)
    report = evaluate(model, coders, bundle.held_out_rows(model, Path(words)), progress=False).together
    assert report is not None
    assert found[0]["kl"] == pytest.approx(report.values["kl"], rel=1e-4)
    assert found[0]["excess"] == pytest.approx(report.values["ce_spliced"] - report.values["ce_clean"], abs=1e-5)
    assert found[0]["recovered_mean"] == pytest.approx(report.values["ce_recovered_mean"], rel=1e-3)
    assert [line["kind"] for line in found] == ["write", "output"]

    shared = ["--valid", words, "--to", str(to), "--model", str(folder)]
    bundle.main(["--run", str(tmp_path / "out"), *shared])
    bundle.main(["--run", str(tuned), "--before", str(run), *shared])
    assert {entry.name for entry in list_coders(to)} == {"l0-out", "l1-out", "l0-write", "l1-write"}
    assert json.loads((to / "evaluation.json").read_text()).keys() == {"sae", "write"}
    card = (to / "README.md").read_text()
    assert card.count("## Training") == 2
    assert "256 positions in 4 steps through the model" in card

    bundle.main(["--run", str(tuned), "--before", str(run), "--average", "2", *shared])
    card = (to / "README.md").read_text()
    assert card.count("## Training") == 2, "what was said of replaced coders goes"
    assert "means over the ends of the last 2 stages" in card
    ends = [SparseCoder.load(folder / "coders" / "l1-write").W_dec for folder in (run, tuned)]
    torch.testing.assert_close(SparseCoder.load(to / "l1-write").W_dec, sum(ends) / 2, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="from 1 to 2"):
        bundle.bundle(tuned, Path(words), to, str(folder), before=[run], average=3)

    line = ["--of", "write", str(tuned), "write", "write", "--prompts", "2", "--length", "8", "--model", str(folder)]
    explained.main([*line, "--valid", words, "--json", str(tmp_path / "explained.json")])
    (found,) = next(iter(json.loads((tmp_path / "explained.json").read_text()).values()))
    frozen = [
        FrozenModel(model, one[None], list(coders.values())) for one in explained.prompts_of(model, Path(words), 2, 8)
    ]
    graphs = [build_graph(one, top_logits(one), max_heads=0) for one in frozen]
    assert found["replacement"] == pytest.approx(sum(scores(graph).replacement for graph in graphs) / 2, rel=1e-4)
    assert found["prompts"] == 2
    assert found["worst"] <= found["replacement"]
