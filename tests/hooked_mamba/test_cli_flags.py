"""Errors in commands name flags, and give no advice that only Python has."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from hooked_mamba.cli import app as main
from hooked_mamba.cli.flags import flags_of, in_flags, offered
from tests.hooked_mamba.saved import save_tiny

FLAGS = {name: "--" + name.replace("_", "-") for name in ("resume", "n_tokens", "out", "lr", "batch_size", "revision")}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("holds a checkpoint: pass resume=True to continue", "holds a checkpoint: pass --resume to continue"),
        ("no end: say how many, n_tokens=", "no end: say how many, --n-tokens"),
        ("needs a folder: out=...", "needs a folder: --out"),
        ("lr must be a number at least 0, got -1", "--lr must be a number at least 0, got -1"),
        ("steps (9) must be at least batch_size (10)", "steps (9) must be at least --batch-size (10)"),
        ("found /tmp/batch_size/out and hook_resid_post", "found /tmp/batch_size/out and hook_resid_post"),
        ("lr_x=3 stays", "lr_x=3 stays"),
        ("give n_tokens= or lr=, one of them", "give --n-tokens or --lr, one of them"),
        ("is local; leave revision= out, got 'x'", "is local; leave --revision out, got 'x'"),
        ("the prompt '' has no tokens; pass prepend_bos=True to start alone", "the prompt '' has no tokens"),
        ("no text file a.txt; pass it in a list, text=[...]", "no text file a.txt"),
        ("has none: pass token ids, or from_pretrained(..., tokenizer=...)", "has none: pass token ids"),
        ("is not installed: install it, or give its path as tokenizer=", "is not installed: install it"),
        ("both replace it: splice one of them, or keep errors (error=True)", "both replace it: splice one of them"),
        ("not in the file. Give it, norm_factor=, and it is worked in", "not in the file"),
        ("is an adapter: load_model('base', adapter='x/y')", "is an adapter"),
        ("the pick(s) are wrong: use 3 file(s)", "the pick(s) are wrong: use 3 file(s)"),
    ],
)
def test_errors_name_flags(said, shown):
    assert offered(in_flags(said, FLAGS)) == shown


def test_a_model_with_an_option_is_named_by_both_flags():
    flags = {"model": "--model", "adapter": "--adapter"}
    said = "x is an adapter of PEFT: load_model(base, adapter='/a/x')"
    assert offered(in_flags(said, flags)) == "x is an adapter of PEFT: give --model base --adapter /a/x"


def test_flags_are_those_of_the_signature():
    def command(
        name: Annotated[str, typer.Argument()],
        source: Annotated[str | None, typer.Option("--in")] = None,
        n_tokens: Annotated[int, typer.Option(min=1)] = 1,
        check: Annotated[bool, typer.Option("--check/--no-check")] = True,
    ) -> None: ...

    assert flags_of(command) == {"source": "--in", "n_tokens": "--n-tokens", "check": "--check"}


@pytest.mark.parametrize("line", [["cache", ""], ["circuit", "", "--out", "c.html"]])
def test_an_empty_prompt(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "tiny")
    app = main.make_app([EntryPoint("circuit", "circuits.commands:app", main.GROUP)])
    found = CliRunner().invoke(app, [*line, "--model", str(model)])
    assert found.exit_code == 2
    assert found.stderr.splitlines()[-1] == "error: the prompt '' has no tokens"
