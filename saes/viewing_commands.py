"""`hooked-mamba sae explore`, and `hooked-mamba explore`: a page about the features of coders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooked_mamba.cli import check_inputs, reports_errors
from saes.command_options import (
    CodersArgument,
    ContextOption,
    DeviceOption,
    ModelOption,
    QuietOption,
    TextOption,
    TokensOption,
    WorkOption,
    app,
    explore_app,
)
from saes.options import OptionError, read_file


@explore_app.command()
@app.command()
@reports_errors
def explore(
    coders: CodersArgument,
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write.")] = Path("out/features.html"),
    model: ModelOption = None,
    feature: Annotated[list[int] | None, typer.Option(help="Only this feature; repeatable. Default: all.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="JSON file of names: feature -> name, or coder -> such a mapping.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Strongest contexts kept of each feature.")] = 20,
    sampled: Annotated[int, typer.Option(min=0, help="Random contexts kept of each feature.")] = 12,
    n_tokens: TokensOption = 100_000,
    context_length: ContextOption = 128,
    work: WorkOption = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Write a page about the features of coders: where they are active, what they promote, which are similar."""
    check_inputs(
        reads={"--text": text, "--labels": labels},
        writes={"--out": out},
        folders={"--work": work},
        model=model,
        device=device,
    )
    names = _labels(read_file(labels)) if labels is not None else None
    from saes.command_parts import load_coders, model_of, processes, trained_model
    from saes.explorer import explore as look

    with processes(device, work) as (world, device):
        named = load_coders(coders, device)
        loaded = model_of(named, model or trained_model(coders), device)
        found = look(
            loaded,
            named,
            text,
            features=feature or None,
            labels=names,
            top=top,
            sampled=sampled,
            n_tokens=n_tokens,
            context_length=context_length,
            folder=work,
            progress=not quiet,
        )
        if world.first:
            page = found.save(out)
            typer.echo(f"{page}, {page.stat().st_size / 2**20:.1f} MiB")


def _labels(read: dict) -> dict:
    """Feature numbers, which are strings in JSON, as integers."""
    if all(isinstance(value, dict) for value in read.values()):
        return {name: _labels(inner) if inner else {} for name, inner in read.items()}
    for key, value in read.items():
        if not key.isdecimal() or not isinstance(value, str):
            raise OptionError(f"labels map features to names, such as 17 to 'food'; got {key!r} to {value!r}")
    return {int(key): value for key, value in read.items()}
