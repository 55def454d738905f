"""What all commands share: how they report errors, what their tables look like, and options that several have."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from hooked_mamba.cli.flags import flags_of, in_flags, offered

WIDTH = 160
"""Columns where the output is no terminal."""

MISTAKES = (ValueError, LookupError, OSError, ImportError, MemoryError, FloatingPointError)
"""Errors that say themselves what is wrong. Any other is a fault of ours, and shows where."""

DEFAULT_MODEL = "tinystories-4l"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Bundled name, folder or hub id.")]


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors are one line and exit code 2, and name its flags; with HOOKED_MAMBA_DEBUG=1 tracebacks."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except MISTAKES as error:
            if os.environ.get("HOOKED_MAMBA_DEBUG") == "1":
                raise
            typer.echo(f"error: {offered(in_flags(one_line(error), flags_of(command)))}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    return run


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    plain_key = type(error) is KeyError and error.args  # whose text is the key's repr
    said = " ".join(str(error.args[0] if plain_key else error).split())
    said = re.sub(r"^\[Errno -?\d+\] ", "", said)
    return said or type(error).__name__


def console() -> Any:
    """A rich Console as wide as the terminal, or wide enough for tables in a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], right: Iterable[str] = ()) -> Any:
    """A plain rich Table; nothing in it is taken for markup. Columns named in `right` are set right."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(value)) for value in row))
    return made


def new_app(name: str, help: str | None = None) -> typer.Typer:
    """An app with the manners of this one."""
    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
