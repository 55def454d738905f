"""The command line `hooked-mamba`. Packages that stand above this one bring commands of their own by entry points."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GROUP = "hooked_mamba.commands"
"""Entry points of this group are typer apps; each becomes a command of its name."""

WIDTH = 160
"""Columns where the output is no terminal."""

MISTAKES = (ValueError, LookupError, OSError, ImportError, MemoryError, FloatingPointError)
"""Errors that say themselves what is wrong. Any other is a fault of ours, and shows where."""

DEFAULT_MODEL = "tinystories-4l"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Bundled name, folder or hub id.")]


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors are one line and exit code 2; with HOOKED_MAMBA_DEBUG=1 they are tracebacks."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except MISTAKES as error:
            if os.environ.get("HOOKED_MAMBA_DEBUG") == "1":
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    return run


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    plain_key = type(error) is KeyError and error.args  # whose text is the key's repr
    said = " ".join(str(error.args[0] if plain_key else error).split())
    return said or type(error).__name__


def console() -> Console:
    """As wide as the terminal, or wide enough for tables in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], right: Iterable[str] = ()) -> Table:
    """A plain table; nothing in it is taken for markup. Columns named in `right` are set right."""
    made = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(value)) for value in row))
    return made


def load_model(name: str, device: str = "cpu") -> Any:
    """A model of the class that its files call for."""
    from hooked_mamba import models

    return models.load_model(name, device=device)


# Commands --------------------------------------------------------------------------------------------------------


@reports_errors
def cache(
    text: Annotated[str, typer.Argument(help="What the model reads; - reads it from standard input.")],
    model: ModelOption = DEFAULT_MODEL,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", "-s", help="Name or glob, such as 'blocks.2.*' or 'blocks.*.mixer.hook_h'; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(help="Likeliest next tokens shown.", min=0)] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the tensors to this safetensors file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Read a text: every hook site with its shape, and the likeliest next tokens.

    Without --site, all sites but the largest (those of every state); name these to get them.
    """
    loaded = load_model(model, device)
    text = sys.stdin.read() if text == "-" else text
    tokens = loaded.to_tokens(text)
    logits, values = loaded.run_with_cache(tokens, names_filter=site or None)
    screen = console()
    screen.print(sites_table(f"{tokens.shape[1]} tokens, {len(values)} sites", values))
    if top:
        probabilities = logits[0, -1, : loaded.d_vocab_real].softmax(-1)
        best = probabilities.topk(min(top, len(probabilities)))
        rows = [
            (repr(loaded.to_single_str_token(i)), f"{p:.1%}")
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        screen.print(table("\nLikeliest next tokens", ("token", "probability"), rows, right=["probability"]))
    if out is not None:
        write_tensors(out, dict(values.items()), {"model": model, "text": text})
        screen.print(f"\n{len(values)} tensors in {escape(str(out))}", soft_wrap=True)


def sites_table(title: str, values: Any) -> Table:
    """Sites with shapes, sizes and meanings."""
    rows = (
        (name, " × ".join(map(str, v.shape)), str(v.dtype).removeprefix("torch."), values.text(name))
        for name, v in values.items()
    )
    return table(title, ("site", "shape", "dtype", "what it is"), rows)


def write_tensors(path: Path, tensors: dict[str, Any], about: dict[str, str]) -> None:
    """A safetensors file, written aside and put in place as a whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, aside, metadata=about)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@reports_errors
def demo(
    model: ModelOption = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Option(help="Text to read.")] = None,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("out/tour.html"),
) -> None:
    """Look inside one prediction: tables here, heat maps on a page. The same as `make demo`."""
    if importlib.util.find_spec("demos") is None:
        raise ImportError(
            "the demos come with the repository, not with the installed package: clone it, and run `make demo` there"
        )
    arguments = ["--model", model, "--out", str(out)]
    importlib.import_module("demos.tour.__main__").main(
        arguments if prompt is None else [*arguments, "--prompt", prompt]
    )


@reports_errors
def models(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The models that come with the package."""
    from hooked_mamba.loading import load_checkpoint
    from hooked_mamba.loading.files import bundled_names

    found = {name: load_checkpoint(name) for name in bundled_names()}
    rows = [
        {
            "name": name,
            "family": c.family,
            "layers": c.cfg.n_layers,
            "width": c.cfg.d_model,
            "vocabulary": c.cfg.d_vocab,
        }
        for name, c in found.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        columns = ("name", "family", "layers", "width", "vocabulary")
        console().print(table("", columns, ([row[c] for c in columns] for row in rows), right=columns[2:]))


def show_version(wanted: bool) -> bool:
    """Print the version and stop."""
    if wanted:
        from hooked_mamba import __version__

        typer.echo(__version__)
        raise typer.Exit
    return wanted


def start(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Look inside state-space models: every internal site readable and writable."""


# Assembly --------------------------------------------------------------------------------------------------------


def make_app(plugins: Iterable[EntryPoint] | None = None) -> typer.Typer:
    """The whole command line: the commands of this file, and those of other packages, found by their entry points."""
    app = new_app("hooked-mamba", help=start.__doc__)
    app.callback()(start)
    app.command()(cache)
    app.command()(demo)
    app.command()(models)
    found = entry_points(group=GROUP) if plugins is None else plugins
    for entry in sorted({entry.name: entry for entry in found}.values(), key=lambda entry: entry.name):
        add_plugin(app, entry)
    return app


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


def add_plugin(app: typer.Typer, entry: EntryPoint) -> None:
    """Add a package's commands. If they cannot be loaded, the others still work, and this one says why."""
    try:
        found = entry.load()
        alone = found.registered_commands
        if len(alone) == 1 and not found.registered_groups and found.registered_callback is None:
            app.command(entry.name)(alone[0].callback)  # no group of one
        else:
            app.add_typer(found, name=entry.name)
    except (ImportError, AttributeError) as error:
        reason = f"the command {entry.name!r} cannot be loaded from {entry.value}: {one_line(error)}"

        @reports_errors
        def unavailable(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
            raise ImportError(reason)

        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command(entry.name, help="(cannot be loaded)", context_settings=settings)(unavailable)


def main() -> None:
    """What the console script calls."""
    make_app()()


if __name__ == "__main__":
    main()
