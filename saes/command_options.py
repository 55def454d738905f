"""What the commands of `hooked-mamba sae` share: the app, and the options that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooked_mamba.cli import new_app

app = new_app("sae", help="SAEs and MambaCoders: train, finetune, eval, capture, explore, push, pull, list.")
explore_app = new_app("explore")
"""`sae explore` again, for the top-level group of viewers."""

CodersArgument = Annotated[
    list[str],
    typer.Argument(help="Folders of coders or trainings, bundled names or hub ids; a folder of several means all."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Bundled name, folder or hub id. Default: what the coders say.")
]
TextOption = Annotated[Path, typer.Option("--text", "-t", help="Text file, documents separated by <|endoftext|>.")]
WorkOption = Annotated[
    Path | None,
    typer.Option(help="Folder for results in pieces: a stopped run continues, and processes under torchrun share it."),
]
TokensOption = Annotated[int, typer.Option("--n-tokens", min=1, help="Stop after so many tokens.")]
ContextOption = Annotated[int, typer.Option("--context-length", min=1, help="Tokens a row.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
