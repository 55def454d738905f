"""Assembly of the command line, and what the console script `hooked-mamba` calls."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated

import typer

from hooked_mamba.cli import models, verify
from hooked_mamba.cli.base import new_app, one_line, reports_errors

GROUP = "hooked_mamba.commands"
"""Entry points of this group, in any installed package, are typer apps; each becomes a command of its name."""


def show_version(wanted: bool) -> bool:
    """Print the version and stop."""
    if wanted:
        typer.echo(version("hooked-mamba"))
        raise typer.Exit
    return wanted


def start(
    wanted: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Look inside state-space models: every internal site readable and writable."""


def make_app(plugins: Iterable[EntryPoint] | None = None) -> typer.Typer:
    """The whole command line: the commands of this package, and those of others, found by their entry points.

    A plugin cannot take the name of a command of ours.
    """
    app = new_app("hooked-mamba", help=start.__doc__)
    app.callback()(start)
    app.command()(models.cache)
    app.command(hidden=True)(models.demo)
    app.command(name="models")(models.models)
    app.command(name="verify")(verify.verify)
    ours = {"cache", "demo", "models", "verify"}
    found = entry_points(group=GROUP) if plugins is None else plugins
    for name, entry in sorted({entry.name: entry for entry in found}.items()):
        if name not in ours:
            add_plugin(app, entry)
    return app


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
