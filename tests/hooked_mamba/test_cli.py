"""The command line: its commands, its errors, and commands that other packages bring."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from typer.testing import CliRunner

import hooked_mamba
from hooked_mamba import HookedMamba
from hooked_mamba.cli import app as main
from hooked_mamba.cli import base
from hooked_mamba.loading.files import bundled_names
from hooked_mamba.models import load_model
from tests.hooked_mamba.saved import save_tiny
from tests.kinds import MAMBA

OURS = {"circuit": "circuits.commands:app", "explore": "saes.commands:explore_app", "sae": "saes.commands:app"}
APP = main.make_app([EntryPoint(name, value, main.GROUP) for name, value in OURS.items()])


def call(*arguments: str, app: typer.Typer = APP, input: str | None = None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input)


def complaint(result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def test_help_names_every_command():
    result = call("--help")
    assert result.exit_code == 0
    names = ("cache", "circuit", "explore", "models", "sae", "verify")
    for name in ("Look inside", *names, "--version", "--install-completion"):
        assert name in result.output
    assert call().exit_code == 2  # no command: help, and not a success
    assert call("--version").output.strip() == hooked_mamba.__version__


def test_the_shell_completes_commands_and_options(monkeypatch):
    monkeypatch.setenv("_HOOKED_MAMBA_COMPLETE", "complete_bash")
    for typed, expected in (("c", {"cache", "circuit"}), ("cache --si", {"--site"})):
        monkeypatch.setenv("COMP_WORDS", f"hooked-mamba {typed}")
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
        result = CliRunner().invoke(main.make_app(), [], prog_name="hooked-mamba")
        assert set(result.output.split()) == expected


def test_cache_shows_sites_and_predictions_and_writes_tensors(folder, tmp_path):
    out = tmp_path / "deep" / "sites.safetensors"
    result = call(
        "cache", "a b c", "-m", folder, "-s", "blocks.1.mixer.hook_dt", "-s", "hook_embed", "-o", out, "--top", 3
    )
    assert result.exit_code == 0, result.output
    assert "3 tokens, 2 sites" in result.output
    assert "1 × 3 × 16" in result.output
    model = HookedMamba.from_pretrained(folder)
    logits, cache = model.run_with_cache("a b c")
    best = logits[0, -1].softmax(-1).topk(3)
    for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        assert f"{p:.1%}" in result.output
        assert repr(model.to_single_str_token(i)) in result.output
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == {"hook_embed", "blocks.1.mixer.hook_dt"}
        torch.testing.assert_close(file.get_tensor("blocks.1.mixer.hook_dt"), cache["dt", 1].detach())
        assert file.metadata()["text"] == "a b c"
    assert [path.name for path in out.parent.iterdir()] == ["sites.safetensors"]


def test_cache_reads_standard_input_and_all_sites(folder):
    result = call("cache", "-", "-m", folder, "--top", 0, input="d e f g")
    assert result.exit_code == 0, result.output
    n = len(HookedMamba.from_pretrained(folder).default_names())
    assert f"4 tokens, {n} sites" in result.output
    assert "Likeliest" not in result.output


def test_markup_in_names_stays_text(tmp_path, capsys):
    base.console().print(base.table("[red]x[/]", ("[b]",), [["[/nothing]"], ["\\[b]"]]))
    shown = capsys.readouterr().out
    assert "[red]x[/]" in shown
    assert "[/nothing]" in shown


@pytest.mark.parametrize("family", MAMBA)
def test_models_of_either_family_are_told_by_their_files(family, tmp_path):
    model = load_model(str(save_tiny(tmp_path / "m", family)))
    assert model.family == family


def test_models_lists_the_bundled_ones():
    result = call("models", "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.output)] == bundled_names()
    assert "tinystories-4l" in call("models").output


def test_errors_are_one_line(folder, tmp_path, monkeypatch):
    assert "nearest: blocks.1.mixer.hook_dt" in complaint(
        call("cache", "a", "-m", folder, "-s", "blocks.1.mixer.hook_dtt")
    )
    assert "'no/such/model/at/all' is neither an existing folder" in complaint(
        call("cache", "a", "-m", "no/such/model/at/all")
    )
    assert "has no tokens" in complaint(call("cache", "", "-m", folder))
    for command in (("cache", "a", "-m"), ("circuit", "a", "-m"), ("verify",)):
        path = tmp_path / "tiny.gguf"
        assert "does not exist" in complaint(call(*command, path))
    assert "--device cuda:99: torch sees" in complaint(call("cache", "a", "-m", folder, "--device", "cuda:99"))
    assert "--device gpu is no device of torch" in complaint(call("cache", "a", "-m", folder, "--device", "gpu"))
    (tmp_path / "file").touch()
    assert "file" in complaint(call("cache", "a", "-m", folder, "-o", tmp_path / "file" / "x.safetensors"))
    assert "No such option" in call("cache", "a", "--sight", "x").stderr
    monkeypatch.setenv("HOOKED_MAMBA_DEBUG", "1")
    assert isinstance(call("cache", "", "-m", folder).exception, ValueError)


def test_what_is_no_mistake_of_the_users_is_not_hidden():
    @base.reports_errors
    def faulty() -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        faulty()


def test_keys_are_not_quoted_twice_and_empty_messages_say_their_kind():
    assert base.one_line(KeyError("no such\nthing")) == "no such thing"
    assert base.one_line(MemoryError()) == "MemoryError"


def test_ctrl_c_ends_without_a_traceback():
    app = base.new_app("test")

    @app.command()
    @base.reports_errors
    def wait() -> None:
        raise KeyboardInterrupt

    result = call(app=app)
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


def test_demo_says_where_the_demos_are():
    assert "clone the repository, and run `make demo`" in complaint(call("demo"))


def test_other_packages_bring_commands(tmp_path, monkeypatch):
    (tmp_path / "guest.py").write_text(
        "from hooked_mamba.cli.base import new_app\napp = new_app('guest', help='A guest.')\n"
        "@app.command()\ndef greet():\n    'Say hello.'\n    print('hello')\n@app.command()\ndef part(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint("visit", "guest:app", main.GROUP)] * 2 + [
        EntryPoint("gone", "no_such_package.commands:app", main.GROUP),
        EntryPoint("odd", "guest:nothing", main.GROUP),
    ]
    app = main.make_app(entries)
    assert "visit" in call("--help", app=app).output
    assert call("visit", "greet", app=app).output == "hello\n"
    assert "the command 'gone' cannot be loaded" in complaint(call("gone", "x", "--flag", app=app))
    assert "guest:nothing" in complaint(call("odd", app=app))
    assert call("models", "--json", app=app).exit_code == 0


def test_a_plugin_takes_no_name_of_ours():
    app = main.make_app([EntryPoint("models", "no_such_package:app", main.GROUP)])
    assert call("models", "--json", app=app).exit_code == 0


COMMANDS = ["", "cache", "circuit", "explore", "models", "sae"]
COMMANDS += [f"sae {name}" for name in ("train", "eval", "explore", "push", "pull", "list")]

HELP = """
import sys
from typer.testing import CliRunner
from importlib.metadata import EntryPoint
from hooked_mamba.cli.app import GROUP, make_app

places = {"circuit": "circuits.commands:app", "explore": "saes.commands:explore_app", "sae": "saes.commands:app"}
app = make_app([EntryPoint(name, value, GROUP) for name, value in places.items()])
for command in sys.argv[1:]:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output, (command, result.output)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-c", HELP, *COMMANDS]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout.split()
    assert "typer" in loaded
    assert not {"torch", "numpy", "transformers", "plotly"} & set(loaded)


@pytest.mark.slow
def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "hooked_mamba.cli", "models"]
    assert "tinystories-4l" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
