"""The command `verify`: a checkpoint here and in transformers, side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from hooked_mamba.cli.base import console, reports_errors, table
from hooked_mamba.cli.inputs import check_inputs


@reports_errors
def verify(
    name: Annotated[str, typer.Argument(help="Hub id, folder or bundled name of a checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="float32 or float64; repeatable. Default: both, where they fit.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The JSON file. Default: verify-NAME.json.")] = None,
) -> None:
    """Load a checkpoint here and with transformers, and compare logits and time on bundled prompts.

    Prints one table and writes a JSON file, which docs/verified.md says where to send. Exit code 1: they differ.
    """
    path = out or default_file(name)
    check_inputs(writes={"--out": path}, model=name, device=device)
    from hooked_mamba import verification

    found = verification.verify(name, revision=revision, device=device, dtypes=dtype or tuple(verification.BOUNDS))
    columns = ("precision", "largest difference", "of logits to", "same top token", "same 20 tokens", "here", "there")
    rows = [
        (
            one.dtype,
            f"{one.max_difference:.2g}",
            f"{one.max_logit:.3g}",
            f"{one.same_top:.1%}",
            "yes" if one.same_continuation else "no",
            f"{one.seconds_here * 1e3:.1f} ms",
            f"{one.seconds_transformers * 1e3:.1f} ms",
        )
        for one in found.comparisons
    ]
    screen = console()
    what = f"{found.name}: {found.family}, {found.parameters:,} numbers, {found.format} format"
    screen.print(table(what, columns, rows, right=columns[1:]), soft_wrap=True)
    if found.reference == "converted":
        screen.print("transformers did not read these files: its model was made of the weights loaded here")
    for precision, why in found.left_out.items():
        screen.print(f"{precision} was left out: {why}", soft_wrap=True, markup=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.to_json(), encoding="utf-8")
    screen.print(f"{'They agree' if found.agrees else 'They DIFFER'}; written to {path}", soft_wrap=True, markup=False)
    if not found.agrees:
        raise typer.Exit(1)


def default_file(name: str) -> Path:
    """verify-NAME.json in the working folder; of a folder its own name, of owner/name on the hub both."""
    called = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    return Path(f"verify-{re.sub(r'[^A-Za-z0-9._-]+', '--', called)}.json")
