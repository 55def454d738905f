"""`hooked-mamba sae push`, `pull` and `list`: coders in repositories and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooked_mamba.cli import console, reports_errors, table
from saes.command_options import CodersArgument, app
from saes.options import OptionError


@app.command()
@reports_errors
def push(
    coders: CodersArgument,
    to: Annotated[str, typer.Option("--to", help="Repository of the hub (owner/name), or a folder.")],
    name: Annotated[
        str | None, typer.Option(help="The coder's name there, if it is one. Default: its folder's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if needed.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision on disk: float64, float32, float16, bfloat16, float8_e4m3fn.")
    ] = None,
    license: Annotated[str, typer.Option(help="The weights' licence, as the hub names it.")] = "mit",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Add coders to a repository of the hub or to a folder, with an index and a card. One push is one commit."""
    from saes import hub
    from saes.command_parts import coder_folders

    named = coder_folders(coders)
    if name is not None:
        if len(named) != 1:
            raise OptionError(f"--name is for one coder, and these are {len(named)}: {', '.join(named)}")
        named = {name: next(iter(named.values()))}
    place = hub.push(named, to, revision=revision, dtype=dtype, license=license, private=private)
    typer.echo(f"{', '.join(named)}: {place}")


@app.command()
@reports_errors
def pull(
    source: Annotated[str, typer.Argument(help="Bundled name, hub id (owner/name or owner/name/coder) or folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the coder into.")],
    name: Annotated[str | None, typer.Option(help="The coder, where the source has several.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Copy a coder into its own folder, checked and converted to our format."""
    from saes import hub

    typer.echo(hub.pull(source, out, name, revision))


@app.command("list")
@reports_errors
def list_(
    query: Annotated[str, typer.Argument(help="Words to find in names, sites, models and architectures.")] = "",
    source: Annotated[
        str | None,
        typer.Option("--in", help="Repository of the hub or a folder. Default: what comes with the package."),
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="Only this architecture.")] = None,
    layer: Annotated[int | None, typer.Option(help="Only this block.")] = None,
    kind: Annotated[str | None, typer.Option(help="sae or mambacoder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """List coders, or search them."""
    from saes import hub

    found = hub.search(query, source, revision, architecture=architecture, layer=layer, kind=kind)
    if not found:
        typer.echo("no coder matches", err=True)
        raise typer.Exit(1)
    columns = ["name", "kind", "architecture", "site", "latents", "k"]
    rows = [[e.name, e.kind, e.architecture, e.site, e.d_sae, e.k or ""] for e in found]
    for metric, heading in (("fvu", "FVU"), ("l0", "L0"), ("ce_recovered_zero", "CE recovered")):
        if any(metric in e.metrics for e in found):
            columns.append(heading)
            for row, e in zip(rows, found, strict=True):
                row.append(f"{e.metrics[metric]:.3g}" if metric in e.metrics else "")
    console().print(table("", columns, rows, right=columns[4:]))
